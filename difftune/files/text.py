"""Texts that a person brings: prompts, captions, labels, settings. One reader, whichever program wrote the file."""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difftune.errors import UserError

MOST = 64 << 20  # bytes of a text
BOMS = {  # the longer ones first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def read_text(path: str | Path, what: str, remedy: str = "give a UTF-8 text file") -> str:
    """A text file in UTF-8, or UTF-16/32 with a byte-order mark (the mark is removed). All line ends become \\n.

    Raises UserError (its message names the file as `what` and ends with `remedy`) if it cannot be read, is not text, or
    is larger than `MOST`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST + 1)  # a device has no size, and may have no end
        if len(data) > MOST:
            raise UserError(f"{what} {str(path)!r} is larger than {MOST >> 20} MiB: give a smaller file")
        text = data.decode(next((name for bom, name in BOMS.items() if data.startswith(bom)), "utf-8"))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {what} {str(path)!r} ({_reason(error)}): {remedy}") from error
    if "\0" in text:
        raise UserError(f"cannot read {what} {str(path)!r} (it holds a NUL, so it is not text): {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is not UTF-8 text" if isinstance(error, UnicodeError) else "its path holds a NUL"


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError if it is not JSON, or an object repeats a key (json would silently keep
    the last); RecursionError for one that is nested too deeply."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {twice[:80]!r} is given twice: give it once")
    return found
