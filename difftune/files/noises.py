"""The noise that `difftune optimize` wrote, for `difftune sample`."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from difftune.errors import RunError, UserError

NOISE = "noise.safetensors"  # of `difftune optimize`


def noises_of(path: str | Path, images: int | None = None) -> Tensor:
    """The noises (B, C, h, w) of a file that `difftune optimize` wrote, one for each of so many images.

    UserError for another number of them, for a file of something else, and where an embedding belongs to the noise.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read the noise {str(path)!r}: {error}") from error
    if "noise" not in found or found["noise"].ndim != 4:
        raise UserError(f"{path} holds no noise: give the {NOISE} of `difftune optimize`")
    if "embedding" in found:
        raise UserError(f"{path} holds a prompt's embedding too, without which its noise makes another picture")
    if images is not None and len(found["noise"]) != images:
        number = len(found["noise"])
        raise UserError(f"{path} holds {number} noises for {images} images: give its prompts, one for each noise")
    return found["noise"]
