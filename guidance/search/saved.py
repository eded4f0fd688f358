"""Searches on disk: one safetensors file, whose header holds the rest as JSON; nothing is pickled.

    for state in SEARCHES[name].search(problem, config, load(file) if file.is_file() else None):
        save(file, state.saved())

A file is written to a temporary name, flushed to the disk and renamed: what lies under its name is always a whole
search, however its writer ended.
"""

import json
import os
import secrets
from pathlib import Path as File

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes

from guidance.search.problem import Saved
from solvers.errors import UserError

FORMAT = "difftune-search-1"


def save(file: str | File, saved: Saved) -> None:
    """Write what a state's `saved()` gave, in place of what lay there."""
    header = {"format": FORMAT, "info": json.dumps(dict(saved.info))}
    tensors = {name: value.detach().cpu().contiguous() for name, value in saved.tensors.items()}
    _write(File(file), as_bytes(tensors, header))


def load(file: str | File) -> Saved:
    """What `save` wrote. Raises ValueError, in one sentence, for anything else."""
    try:
        with safe_open(file, "pt") as found:
            header, names = found.metadata() or {}, list(found.keys())
            tensors = {name: found.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a saved search ({error}): give the file that a search wrote") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{file} is not a saved search: its format is {header.get('format')}, not {FORMAT}")
    return Saved(tensors, json.loads(header["info"]))


def _write(file: File, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
