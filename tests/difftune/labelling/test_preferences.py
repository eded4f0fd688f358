"""Published pairs: each layout is read, ties are left out, and what is missing is named with its row."""

import io
import json

import pytest
import torch
from PIL import Image

from difftune.files.pictures import read_picture
from difftune.labelling.preferences import preferences_named
from difftune.recipes import train
from tests.support import pipelines
from tests.support.toys import toy


def picture(folder, name, shade):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade, shade, shade)).save(folder / name)
    return name


def encoded(shade) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


def shades(choice):
    return [round(float(read_picture(side).mean()) * 255) for side in (choice.winner, choice.loser)]


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_a_folder_with_pairs_of_ones_own(tmp_path):
    for name, shade in (("good.png", 200), ("bad.png", 50)):
        picture(tmp_path, name, shade)
    rows = [{"prompt": "a snail", "chosen": "good.png", "rejected": "bad.png"}] * 3
    lines(tmp_path / "pairs.jsonl", rows)
    found = preferences_named(str(tmp_path))
    assert len(found) == 3 and found[1].prompt == "a snail" and shades(found[1]) == [200, 50]
    assert [choice.line for choice in found[1:]] == [1, 2]


def test_hpd_v2_and_v3(tmp_path):
    for name, shade in (("a.jpg", 200), ("b.jpg", 50)):
        picture(tmp_path / "train", name, shade)
    rows = [{"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": judged} for judged in ([1, 0], [0, 1])]
    (tmp_path / "train.json").write_text(json.dumps([*rows, {**rows[0], "human_preference": [0, 0]}]))
    found = preferences_named(str(tmp_path / "train.json"))
    assert [shades(choice) for choice in found] == [[200, 50], [50, 200]]
    third = [{"prompt": "y", "path1": "train/b.jpg", "path2": "train/a.jpg", "confidence": 0.9}]
    assert shades(preferences_named(lines(tmp_path / "v3.jsonl", third))[0]) == [50, 200]


@pytest.fixture
def pick_a_pic(tmp_path):
    """Four rows: the first better, the second better, a tie, and one without a label."""
    datasets = pytest.importorskip("datasets")
    labels, has = [1.0, 0.0, 0.5, 1.0], [True, True, True, False]
    table = {"caption": ["red circle"] * 4, "jpg_0": [encoded(200)] * 4, "jpg_1": [encoded(50)] * 4}
    datasets.Dataset.from_dict({**table, "label_0": labels, "has_label": has}).to_parquet(tmp_path / "pick.parquet")
    return f"dataset:{tmp_path / 'pick.parquet'}"


def test_pick_a_pics_bytes_are_read_when_they_are_needed_and_ties_are_left_out(pick_a_pic):
    found = preferences_named(pick_a_pic)
    assert [shades(choice) for choice in found] == [[200, 50], [50, 200]]
    assert str(found[0].a).startswith("of row 0 of dataset:")


def test_a_data_set_of_images_is_not_decoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["x"], "chosen": [{"bytes": encoded(200)}], "rejected": [{"bytes": encoded(50)}]}
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    data.to_parquet(tmp_path / "own.parquet")
    assert shades(preferences_named(f"dataset:{tmp_path / 'own.parquet'}")[0]) == [200, 50]


@pytest.mark.parametrize("name", ["dpo", "kto", "dro"])
def test_recipes_train_on_them(name, pick_a_pic, tmp_path):
    said: list[str] = []
    config = toy(name, tmp_path, labels=pick_a_pic, max_train_steps=1, guidance="none")
    ((metrics, _),) = train(config, None, pipelines.sd(), None, said.append)
    assert metrics["grad_norm"] > 0 and "labels: 2 decided pairs, 2 undecided are left out" in said
    assert torch.isfinite(torch.tensor(metrics["loss"]))


def test_what_cannot_be_is_one_sentence(tmp_path):
    picture(tmp_path, "a.png", 9)
    pairs = tmp_path / "pairs.jsonl"
    for rows, what in [
        ([{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}], r"row 0: there is no picture .*b.png"),
        ([{"prompt": "x", "chosen": "a.png", "rejected": "a.png"}], "row 0: both pictures are"),
        ([{"prompt": "x", "chosen": "a.png", "rejected": 3}], "a picture is int: give a path, or bytes"),
        ([{"prompt": "x", "good": "a.png"}], "has the columns prompt, good: known are prompt, chosen, rejected"),
        (
            [{"prompt": "x", "file_path": ["a", "b"], "human_preference": [1, 1]}],
            "holds no pair of which one is better",
        ),
    ]:
        with pytest.raises(ValueError, match=what) as error:
            preferences_named(lines(pairs, rows))
        assert "\n" not in str(error.value)
    pairs.write_text("{")
    with pytest.raises(ValueError, match="is not JSON that can be read"):
        preferences_named(str(tmp_path))
