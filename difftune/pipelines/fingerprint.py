"""The digest of the weights that a run, an adapter or an evaluation was made with, which is written and compared."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from difftune.errors import UserError

KEY = "difftune_model"  # in a safetensors file's metadata
CHUNKS, CHUNK = 64, 65536  # of each file: so many places, so many bytes


def digest_of(pipe: Any) -> str | None:
    """16 hex digits of the files that the pipeline's networks were loaded from; None if it was loaded from none.

    Of each file, its name, its size and 64 pieces of 64 KiB count: all of an embedded model, a sample of a large one.
    """
    files = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in _files(pipe)]
    return _digest(tuple(files)) if files else None


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The digest of files, given with their sizes and times so that a file that was replaced is read again."""
    sha = hashlib.sha256()
    for file, size, _ in files:
        sha.update(f"{file.parent.name}/{file.name}\0{size}\0".encode())
        for piece in _pieces(file, size):
            sha.update(piece)
    return sha.hexdigest()[:16]


def _files(pipe: Any) -> Iterator[Path]:
    """The weight files of the pipeline's networks; of several variants, the plain one."""
    folder = folder_of(str(getattr(pipe, "name_or_path", None) or ""))
    if folder is None:
        return
    for name in sorted(name for name, part in pipe.components.items() if isinstance(part, nn.Module)):
        found = sorted((folder / name).glob("*.safetensors"))
        yield from [file for file in found if file.name.count(".") == 1] or found


def folder_of(name: str) -> Path | None:
    """The local folder of a model: itself, or the Hub's cache of "owner/name"."""
    if (Path(name) / "model_index.json").is_file():
        return Path(name)
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    step = max(CHUNK, ceil((size - CHUNK) / (CHUNKS - 1)))  # so that the last piece reaches the end
    with file.open("rb") as opened:
        for start in range(0, size, step):
            opened.seek(start)
            yield opened.read(CHUNK)


def recorded(file: Path) -> str | None:
    """The digest in a safetensors file's metadata; None in files that we did not write."""
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get(KEY)
    except (SafetensorError, OSError):
        return None  # whoever loads the file says what is wrong with it


def differ(then: str | None, now: str | None) -> bool:
    """Whether both digests are known, and not the same."""
    return then is not None and now is not None and then != now


def check_resumed(pipe: Any, then: str | None) -> None:
    """UserError if a run would go on with other weights than it began with."""
    now = digest_of(pipe)
    if differ(then, now):
        raise UserError(
            f"the checkpoint was made with a model of digest {then}, and this one's is {now}: resume with the weights "
            "of the first run, or begin a new one"
        )
