"""Texts that a person brings: prompts, captions, labels, settings. One reader, whatever wrote them."""

import codecs
from pathlib import Path

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
        if Path(path).stat().st_size > MOST:
            raise UserError(f"{what} {str(path)!r} is larger than {MOST >> 20} MiB: give a smaller file")
        data = Path(path).read_bytes()
        text = data.decode(next((name for bom, name in BOMS.items() if data.startswith(bom)), "utf-8"))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a UnicodeDecodeError, or a path that holds a NUL
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no UTF-8 text"
        raise UserError(f"cannot read {what} {str(path)!r} ({why}): {remedy}") from error
    if "\0" in text:
        raise UserError(f"cannot read {what} {str(path)!r} (it holds a NUL, so it is not text): {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n")
