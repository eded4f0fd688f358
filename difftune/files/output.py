"""Output folders and files: a folder belongs to one run, and a file is either whole or not there."""

import io
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from difftune.errors import UserError


def unused(folder: str | Path) -> Path:
    """The folder, if it is absent or empty: nothing of another run is ever overwritten."""
    folder = Path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if folder.exists():
        held = f"holds another run ({min(p.name for p in folder.iterdir())})" if folder.is_dir() else "is a file"
        raise UserError(f"{folder} {held}: nothing was written, choose another --output_dir")
    return folder


def write(path: Path, data: bytes | str) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2) + "\n")


def png(image: Any) -> bytes:
    """A picture (H, W, 3) in [0, 1] as PNG."""
    buffer = io.BytesIO()
    _picture(image).save(buffer, format="PNG")
    return buffer.getvalue()


def grid(images: Sequence[Any], columns: int | None = None, gap: int = 2) -> bytes:
    """Pictures (H, W, 3) of one size in rows of `columns`, as PNG."""
    pictures = [_picture(image) for image in images]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].width + gap, pictures[0].height + gap
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _picture(image: Any) -> Image.Image:
    return Image.fromarray((image * 255).round().astype("uint8"))
