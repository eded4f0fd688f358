"""Searches on disk: one safetensors file, whose header holds the rest as JSON; nothing is pickled.

    for state in SEARCHES[name].search(problem, config, load(file) if file.is_file() else None):
        save(file, state.saved())

A file is written whole (`guidance.files`): what lies under its name is always a whole search, however its writer ended.
"""

import json
from pathlib import Path as File

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes

from guidance.files import write
from guidance.search.problem import Saved
from solvers.errors import UserError

FORMAT = "difftune-search-1"


def save(file: str | File, saved: Saved) -> None:
    """Write what a state's `saved()` gave, in place of what lay there. OSError where the disk refuses."""
    header = {"format": FORMAT, "info": json.dumps(dict(saved.info))}
    tensors = {name: value.detach().cpu().contiguous() for name, value in saved.tensors.items()}
    write(File(file), as_bytes(tensors, header))


def load(file: str | File) -> Saved:
    """Read what `save` wrote. Raises ValueError, in one sentence, for anything else."""
    try:
        with safe_open(file, "pt") as found:
            header, names = found.metadata() or {}, list(found.keys())
            tensors = {name: found.get_tensor(name).clone() for name in names}  # as an allocator aligns them
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a saved search ({error}): give the file that a search wrote") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{file} is not a saved search: its format is {header.get('format')}, not {FORMAT}")
    try:
        return Saved(tensors, dict(json.loads(header["info"])))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a saved search ({error}): give the file that a search wrote") from error
