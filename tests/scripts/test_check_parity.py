"""The check of published weights, on small random checkpoints of their layouts; and on the published ones."""

import hashlib

import pytest
import torch

from rewards.registry import load
from tests.support import checkpoints
from tests.support.benches import script

with script("check_parity") as parity:
    pass

CASES = {case.reward: case for case in parity.CASES}


@pytest.fixture
def clip_options(tmp_path):
    return {"weights": checkpoints.clip_file(tmp_path), "sizes": checkpoints.CLIP_SIZES}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two pictures with their hashes in place of the published ones."""
    files = parity.random_pictures(tmp_path, 2, 40)
    known = {file.name: ("none", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}
    monkeypatch.setattr(parity, "PICTURES", known)
    return tmp_path


def test_scores_are_compared_with_printed_ones_and_with_their_code(data, clip_options, monkeypatch):
    names, prompts = ["random0.png", "random1.png"], ["a red circle", "a blue square"]
    pictures = [parity.opened(data / name)[None] for name in names]
    ours = [load("pickscore", **clip_options)(x, [p]).item() for x, p in zip(pictures, prompts, strict=True)]
    case = parity.Case("pickscore", names, prompts, ours, package="torch", theirs=lambda files, words: [
        ours[0] + 0.01, *ours[1:], *[0.0] * (len(files) - 2)
    ])  # fmt: skip
    row = parity.compare(case, data, [], **clip_options)
    assert row.printed == "0" and row.theirs.startswith("0.01 (torch ") and row.agrees
    row = parity.compare(case._replace(tolerance=0.005), data, [], **clip_options)
    assert row.agrees is False and "DISAGREES" in parity.table([row])
    bare = case._replace(printed=(), theirs=None)
    assert parity.compare(bare, data, [], **clip_options).agrees is None
    absent = case._replace(package="no-such-package")
    assert parity.compare(absent, data, [], **clip_options).theirs == ""


def test_a_picture_of_another_hash_is_refused(data):
    (data / "random0.png").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the picture that was published"):
        parity.fetch_picture(data, "random0.png")


def test_what_cannot_be_fetched_is_left_out_and_is_no_disagreement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_parity.py", "imagereward", "--output", str(tmp_path / "parity.md")])
    assert parity.main() == 0
    assert "imagereward is left out: " in capsys.readouterr().err
    assert (tmp_path / "parity.md").read_text().startswith("| reward |")


def test_the_cases_fit():
    for case in parity.CASES:
        assert len(case.pictures) == len(case.prompts) and len(case.printed) in (0, len(case.pictures))
        assert set(case.pictures) <= parity.PICTURES.keys() and (case.printed or case.theirs)
    probabilities = parity.softmax(torch.tensor([0.3, 0.25, 0.2]))
    assert probabilities.sum().item() == pytest.approx(1) and probabilities[0] > 0.99


@pytest.mark.network
@pytest.mark.parametrize("name", CASES)
def test_published_weights_agree(name, tmp_path):
    row = parity.compare(CASES[name], parity.DATA, parity.random_pictures(tmp_path))
    assert row.agrees is not False, row
