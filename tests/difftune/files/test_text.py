"""Every text that a person brings: byte-order marks, encodings and line ends change nothing."""

import json

import pytest
from PIL import Image

from difftune.errors import UserError
from difftune.files import text
from difftune.files.pictures import list_pictures
from difftune.files.prompts import read_prompts
from difftune.files.text import parse_json, read_text
from difftune.labelling.choices import read_labels
from difftune.labelling.server import open_server

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
    ("data", "why"), [(b"\x80abc", "it is not UTF-8 text"), (b"a\0b", "holds a NUL"), (None, "No such file")]
)
def test_what_is_no_text_is_named(tmp_path, data, why):
    if data is not None:
        (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"cannot read the text '.*a.txt' .*{why}"):
        read_text(tmp_path / "a.txt", "the text")


def test_a_path_with_a_nul_is_named_as_such():
    with pytest.raises(UserError, match=r"cannot read the text 'a\\x00b' \(its path holds a NUL\)"):
        read_text("a\0b", "the text")


def test_text_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(text, "MOST", 1000)
    with pytest.raises(UserError, match="the text '/dev/zero' is larger than"):
        read_text("/dev/zero", "the text")


TWICE = {
    "a.json": '{"a.png": "red", "a.png": "blue"}',
    "b.jsonl": '{"file": "a.png", "prompt": "red", "prompt": "blue"}\n',
    "c.jsonl": '{"file": "a.png", "prompt": "red"}\n{"file": "./a.png", "prompt": "blue"}\n',
    "d.csv": "file,prompt\na.png,red\na.png,blue\n",
    "e.csv": "file,prompt,prompt\na.png,red,blue\n",
}


@pytest.mark.parametrize("name", TWICE)
def test_what_a_table_says_twice_is_refused(tmp_path, name):
    for picture in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / picture)
    (tmp_path / name).write_text(TWICE[name])
    with pytest.raises(UserError, match="twice|two columns"):
        open_server(images=str(tmp_path), prompts=str(tmp_path / name), labels=str(tmp_path / "l.jsonl"), port=0)
    assert not (tmp_path / "l.jsonl").exists()


@pytest.mark.parametrize(
    "line", ['{"file_name": "a.png", "text": "b", "text": "a"}', '{"file_name": "b.png", "text": "a"}']
)
def test_captions_that_are_there_twice_are_refused(tmp_path, line):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text(line + '\n{"file_name": "b.png", "text": "c"}\n')
    with pytest.raises(UserError, match="twice"):
        list_pictures(tmp_path)


def test_json_says_which_key_is_there_twice():
    assert parse_json('{"a": [{"b": 1}, {"b": 2}]}') == {"a": [{"b": 1}, {"b": 2}]}
    with pytest.raises(ValueError, match="the key 'b' is given twice"):
        parse_json('{"a": [{"b": 1, "c": 2, "b": 1}]}')
