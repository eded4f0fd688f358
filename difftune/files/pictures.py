"""A folder of pictures and what they show: examples of a style, of a concept, of what images should be like.

What a picture shows is told by `metadata.jsonl`, as the datasets library has it ({"file_name": "a.png", "text": "..."}
on each line), or by a text file beside it (a.txt for a.png), or by one caption for all. A folder of `difftune sample`
tells it by itself: the pictures are those of its sample.json, without the grid, and each shows its prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from difftune.errors import RunError, UserError
from difftune.files.output import png, write
from difftune.files.text import parse_json, read_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MOST_PIXELS = 64 << 20  # of one picture, as many as of a square of 8192
METADATA, SAMPLES = "metadata.jsonl", "sample.json"


@dataclass(frozen=True)
class Encoded:
    """A picture that a data set holds as bytes."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Picture:
    """A file, and what it shows."""

    path: Path
    caption: str | None = None


def list_pictures(folder: str | Path, caption: str | None = None) -> list[Picture]:
    """The pictures of a folder by their names; `caption` is that of those which have none.

    Raises UserError for what is not a folder, has no picture, or has a metadata.jsonl or sample.json that is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder of pictures {str(folder)!r}: give one")
    sampled = _sampled(folder / SAMPLES)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    files = [path for path in files if path.name in sampled] if sampled else files
    if not files:
        raise UserError(f"{folder} has no picture: it must hold files that end in {', '.join(sorted(SUFFIXES))}")
    captions = sampled | _captions(folder / METADATA)
    return [Picture(path, captions.get(path.name) or _beside(path) or caption) for path in files]


def list_captioned(folder: str | Path, caption: str | None = None) -> list[Picture]:
    """`pictures`, each of which has a caption; UserError, which names the first that has none."""
    found = list_pictures(folder, caption)
    for picture in found:
        if picture.caption is None:
            raise UserError(
                f"{picture.path} has no caption: write it into {picture.path.with_suffix('.txt').name} or {METADATA}, "
                "or give one --caption for all"
            )
    return found


def read_fitted(path: "Path | Encoded", height: int, width: int) -> Tensor:
    """The picture as (3, height, width) in [0, 1]: resized (antialiased bicubic) to cover that size, then cropped."""
    image = read_picture(path)[None]
    scale = max(height / image.shape[2], width / image.shape[3])
    size = [max(side, round(scale * of)) for side, of in zip((height, width), image.shape[2:], strict=True)]
    covering = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return covering[0, :, top : top + height, left : left + width]


def read_all(found: list[Picture], size: tuple[int, int]) -> Tensor:
    """All pictures (N, 3, height, width) in [0, 1]."""
    return torch.stack([read_fitted(picture.path, *size) for picture in found])


def pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] as pictures of PIL."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def save_pictures(folder: str | Path, pictures: Sequence[Image.Image]) -> list[Path]:
    """Write 000.png, 001.png and so on to a folder, and return the files. DiskError if it cannot be written."""
    files = [Path(folder, f"{i:03d}.png") for i in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        write(file, png(np.asarray(picture) / 255))
    return files


def _sampled(file: Path) -> dict[str, str]:
    """The prompts of the pictures that `difftune sample` wrote, by their names; {} without its file."""
    if not file.is_file():
        return {}
    text = read_text(file, "the pictures of")
    try:
        return {image["file"]: str(image["prompt"]) for image in parse_json(text)["images"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not what `difftune sample` writes: {error!r}; rename or remove it") from error


def _captions(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    text = read_text(file, "the captions of")
    try:
        lines = [parse_json(line) for line in text.split("\n") if line.strip()]
        found = {line["file_name"]: str(line["text"]).strip() for line in lines}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{file} wants lines of {{"file_name": ..., "text": ...}}: {error!r}') from error
    if len(found) < len(lines):
        raise UserError(f"{file} lists a picture twice: give each one text")
    return found


def _beside(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    return read_text(file, "the caption").strip() or None if file.is_file() else None


def read_picture(path: str | Path | Encoded) -> Tensor:
    """The picture of a file, (3, H, W) in [0, 1], turned as its EXIF orientation says.

    RunError for a file that is not a picture, and for one of more than `MOST_PIXELS`, which are not read.
    """
    try:
        with Image.open(BytesIO(path.data) if isinstance(path, Encoded) else path) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise RunError(
                    f"image {str(path)!r} has {size}, and at most {MOST_PIXELS >> 20} Mi are read: resize it"
                )
            x = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.float32) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        if isinstance(error, RunError):
            raise
        raise RunError(f"cannot read image {str(path)!r}: {' '.join(str(error).split())}") from error
    return torch.from_numpy(x).permute(2, 0, 1)
