"""Every text that a person brings: byte-order marks, encodings and line ends change nothing."""

import json

import pytest

from difftune.errors import UserError
from difftune.files.pictures import list_pictures
from difftune.files.prompts import read_prompts
from difftune.files.text import read_text
from difftune.labelling.choices import read_labels

TEXT = "a red circle\nun cercle bleu \u00e9\u2028x\n"
WRITTEN = [
    TEXT.encode(),
    TEXT.encode("utf-8-sig"),
    TEXT.encode("utf-16"),
    TEXT.encode("utf-32"),
    TEXT.replace("\n", "\r\n").encode(),
    TEXT.replace("\n", "\r").encode("utf-8-sig"),
]


@pytest.mark.parametrize("data", WRITTEN)
def test_text_is_the_same_however_it_is_written(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt", "the text") == TEXT
    assert read_prompts(tmp_path / "a.txt") == ["a red circle", "un cercle bleu \u00e9\u2028x"]
    (tmp_path / "a.png").write_bytes(b"")
    assert list_pictures(tmp_path)[0].caption == TEXT.strip()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_and_labels_are_read_in_any_encoding(tmp_path, encoding):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    lines = [json.dumps({"file_name": "a.png", "text": "caf\u00e9"}, ensure_ascii=False)]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode(encoding))
    assert list_pictures(tmp_path)[0].caption == "caf\u00e9"
    label = {"prompt": "caf\u00e9", "a": "a.png", "b": "b.png", "choice": "a"}
    (tmp_path / "labels.jsonl").write_bytes((json.dumps(label, ensure_ascii=False) + "\r\n").encode(encoding))
    assert read_labels(tmp_path / "labels.jsonl")[0].prompt == "caf\u00e9"


@pytest.mark.parametrize(
    ("data", "why"), [(b"\x80abc", "no UTF-8 text"), (b"a\0b", "holds a NUL"), (None, "No such file")]
)
def test_what_is_no_text_is_named(tmp_path, data, why):
    if data is not None:
        (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"cannot read the text '.*a.txt' .*{why}"):
        read_text(tmp_path / "a.txt", "the text")
