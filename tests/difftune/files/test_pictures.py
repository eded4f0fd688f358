"""A folder of pictures: what they show, and how they are read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from difftune.errors import UserError
from difftune.files import prompts
from difftune.files.pictures import list_captioned, list_pictures, read_all, read_fitted, read_picture
from difftune.labelling import tasks
from difftune.labelling.choices import read_labels


def draw(path, width: int = 8, height: int = 8, color=(255, 0, 0)) -> None:
    Image.new("RGB", (width, height), color).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.png", "c.PNG"):
        draw(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_captions_are_of_the_metadata_then_of_a_file_beside_then_of_all(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red circle"}\n\n')
    (folder / "a.txt").write_text("not this one")
    (folder / "b.txt").write_text(" blue square\n")
    found = list_pictures(folder, "anything")
    assert [(p.path.name, p.caption) for p in found] == [
        ("a.png", "red circle"),
        ("b.png", "blue square"),
        ("c.PNG", "anything"),
    ]
    with pytest.raises(UserError, match=r"c\.PNG has no caption: write it into c\.txt or metadata\.jsonl"):
        list_captioned(folder)


def test_a_folder_of_samples_is_its_pictures_with_their_prompts_and_without_the_grid(folder):
    draw(folder / "grid.png")
    images = [{"file": "a.png", "prompt": "red circle"}, {"file": "b.png", "prompt": "blue square"}]
    (folder / "sample.json").write_text(json.dumps({"images": images}))
    found = [(p.path.name, p.caption) for p in list_captioned(folder, "anything")]
    assert found == [("a.png", "red circle"), ("b.png", "blue square")]
    (folder / "sample.json").write_text("{}")
    with pytest.raises(UserError, match=r"sample\.json is not what `difftune sample` writes"):
        list_pictures(folder)


def test_picture_covers_and_is_centred(tmp_path):
    """A picture twice as wide as high: its middle square; the pixels of the same size are the file's."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    expected = torch.from_numpy(pixels[:, 3:9]).permute(2, 0, 1) / 255
    torch.testing.assert_close(read_fitted(tmp_path / "wide.png", 6, 6), expected, rtol=0, atol=1e-6)
    assert read_fitted(tmp_path / "wide.png", 5, 7).shape == (3, 5, 7)
    draw(tmp_path / "plain.png", 5, 9, (51, 102, 255))
    for size in ((4, 4), (20, 10)):
        found = read_all(list_pictures(tmp_path)[:1], size)
        assert found.shape == (1, 3, *size)
        torch.testing.assert_close(found.mean((0, 2, 3)), torch.tensor([0.2, 0.4, 1.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("text", ["{torn", '{"file_name": "a.png"}', "[1]"])
def test_what_cannot_be_read_is_one_sentence(folder, tmp_path_factory, text):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match="metadata.jsonl wants lines of") as error:
        list_pictures(folder)
    assert "\n" not in str(error.value)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=r"has no picture: it must hold files that end in \.bmp, \.jpeg"):
        list_pictures(empty)
    with pytest.raises(UserError, match="there is no folder of pictures '/nowhere'"):
        list_pictures("/nowhere")


def test_a_picture_stands_as_its_camera_noted_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(read_picture(tmp_path / "turned.png"), expected, rtol=0, atol=1e-6)
    with Image.open(tmp_path / "turned.png") as picture:
        assert picture.size == (7, 4)


LINES = "a red circle\nein grüner Kreis\n\na line\u2028within\n"
WRITTEN = {
    "plain": LINES.encode(),
    "with a mark": LINES.encode("utf-8-sig"),
    "of Windows": LINES.replace("\n", "\r\n").encode("utf-8-sig"),
    "of old Macs": LINES.replace("\n", "\r").encode(),
    "of Notepad": LINES.replace("\n", "\r\n").encode("utf-16"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_texts_are_read_whatever_wrote_them(tmp_path, how):
    """Prompts, captions beside pictures and in tables, and the prompts of pictures to label."""
    (tmp_path / "prompts.txt").write_bytes(WRITTEN[how])
    assert prompts.read_prompts(tmp_path / "prompts.txt") == [line for line in LINES.split("\n") if line]
    draw(tmp_path / "a.png", 4, 4, (0, 0, 0))
    coding = "utf-16" if how == "of Notepad" else "utf-8-sig" if "mark" in how or "Windows" in how else "utf-8"
    (tmp_path / "a.txt").write_bytes("ein grüner Kreis\r\n".encode(coding))
    assert list_pictures(tmp_path)[0].caption == "ein grüner Kreis"
    (tmp_path / "a.txt").unlink()
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "grün"}\r\n\r\n'.encode(coding))
    assert list_pictures(tmp_path)[0].caption == tasks.pictures_to_label(tmp_path)[0].prompt == "grün"


@pytest.mark.parametrize("data", [b"\xff\xfea", b"gr\xfcn", b"\x00\x01"])
def test_what_is_no_text_is_one_sentence(tmp_path, data):
    draw(tmp_path / "a.png", 4, 4, (0, 0, 0))
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "prompts.jsonl").write_bytes(data)
    for read_it in (list_pictures, tasks.pictures_to_label, lambda folder: prompts.read_prompts(folder / "a.txt"),
                    lambda folder: read_labels(folder / "a.txt")):  # fmt: skip
        with pytest.raises(UserError, match="cannot read the") as error:
            read_it(tmp_path)
        assert "\n" not in str(error.value)
