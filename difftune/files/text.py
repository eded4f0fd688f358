"""Texts that a person brings: prompts, captions, labels, settings. One reader, whatever wrote them."""

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
    """A text file of UTF-8, or of UTF-16 and UTF-32 that say so by a byte-order mark, which is left out. Every line
    ends in a newline alone, whatever ended it in the file.

    Raises UserError, which calls the file `what` and ends in the remedy, if it cannot be read, is not text, or is
    larger than `MOST`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST + 1)  # a device has no size, and may have no end
        if len(data) > MOST:
            raise UserError(f"{what} {str(path)!r} is larger than {MOST >> 20} MiB: give a smaller file")
        text = data.decode(next((name for bom, name in BOMS.items() if data.startswith(bom)), "utf-8"))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a UnicodeDecodeError, or a path that holds a NUL
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no UTF-8 text"
        raise UserError(f"cannot read {what} {str(path)!r} ({why}): {remedy}") from error
    if "\0" in text:
        raise UserError(f"cannot read {what} {str(path)!r} (it holds a NUL, so it is not text): {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError where it is none, or where an object has a key twice, of which the
    last would win; RecursionError for one that is nested too deeply."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is given twice: give it once")
    return found
