"""A folder of pictures: what they show, and how they are read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from difftune.errors import UserError
from difftune.files.pictures import captioned, pictures, read, stack


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
    found = pictures(folder, "anything")
    assert [(p.path.name, p.caption) for p in found] == [
        ("a.png", "red circle"),
        ("b.png", "blue square"),
        ("c.PNG", "anything"),
    ]
    with pytest.raises(UserError, match=r"c\.PNG has no caption: write it into c\.txt or metadata\.jsonl"):
        captioned(folder)


def test_a_folder_of_samples_is_its_pictures_with_their_prompts_and_without_the_grid(folder):
    draw(folder / "grid.png")
    images = [{"file": "a.png", "prompt": "red circle"}, {"file": "b.png", "prompt": "blue square"}]
    (folder / "sample.json").write_text(json.dumps({"images": images}))
    found = [(p.path.name, p.caption) for p in captioned(folder, "anything")]
    assert found == [("a.png", "red circle"), ("b.png", "blue square")]
    (folder / "sample.json").write_text("{}")
    with pytest.raises(UserError, match=r"sample\.json is not what `difftune sample` writes"):
        pictures(folder)


def test_picture_covers_and_is_centred(tmp_path):
    """A picture twice as wide as high: its middle square; the pixels of the same size are the file's."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    expected = torch.from_numpy(pixels[:, 3:9]).permute(2, 0, 1) / 255
    torch.testing.assert_close(read(tmp_path / "wide.png", 6, 6), expected, rtol=0, atol=1e-6)
    assert read(tmp_path / "wide.png", 5, 7).shape == (3, 5, 7)
    draw(tmp_path / "plain.png", 5, 9, (51, 102, 255))
    for size in ((4, 4), (20, 10)):
        found = stack(pictures(tmp_path)[:1], size)
        assert found.shape == (1, 3, *size)
        torch.testing.assert_close(found.mean((0, 2, 3)), torch.tensor([0.2, 0.4, 1.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("text", ["{torn", '{"file_name": "a.png"}', "[1]"])
def test_what_cannot_be_read_is_one_sentence(folder, tmp_path_factory, text):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match="metadata.jsonl wants lines of") as error:
        pictures(folder)
    assert "\n" not in str(error.value)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=r"has no picture: it must hold files that end in \.bmp, \.jpeg"):
        pictures(empty)
    with pytest.raises(UserError, match="there is no folder of pictures '/nowhere'"):
        pictures("/nowhere")
