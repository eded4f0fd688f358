"""The check of parity, on small random checkpoints of the published layouts, and on the published weights."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewards.learned.lpips import HEADS
from rewards.registry import REWARDS, load
from tests.support import checkpoints
from tests.support.benches import script
from tests.support.references import lpips_distance

with script("check_parity") as parity:
    pass

CASES = {case.name: case for case in parity.CASES}
PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.fixture
def clip_options(tmp_path):
    return {"weights": checkpoints.clip_file(tmp_path), "sizes": checkpoints.CLIP_SIZES}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two pictures with their hashes in place of the published ones."""
    files = parity.random_pictures(tmp_path, 2, 64)
    known = {file.name: ("none", hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}
    monkeypatch.setattr(parity, "PICTURES", known)
    return tmp_path


def test_scores_are_compared_with_printed_ones_and_with_their_code(data, clip_options, monkeypatch):
    names, prompts = ["random0.png", "random1.png"], ["a red circle", "a blue square"]
    pictures = [parity.opened(data / name)[None] for name in names]
    ours = [load("pickscore", **clip_options)(x, [p]).item() for x, p in zip(pictures, prompts, strict=True)]
    theirs = [ours[0] + 0.01, *ours[1:]]
    case = parity.Case("pickscore", "torch", lambda files, words: theirs, 0.02, names, prompts, ours)
    printed, code = parity.compare(case, data, [], **clip_options)
    assert (printed.gap, printed.agrees) == (0, True)
    assert code.gap == pytest.approx(0.01) and code.against.startswith("torch ") and code.agrees
    _, code = parity.compare(case._replace(tolerance=0.005), data, [], **clip_options)
    assert code.agrees is False and "DISAGREES" in parity.table([code])
    (absent,) = parity.compare(case._replace(printed=(), package="no-such-package"), data, [], **clip_options)
    assert absent.agrees is None and "no-such-package is not installed" in parity.table([absent])


def test_a_picture_may_be_an_option(data, tmp_path):
    weights = checkpoints.alexnet_file(tmp_path)
    first, second = (parity.opened(data / f"random{i}.png")[None] for i in range(2))
    expected = [0.0, -parity_of_lpips(second, first)]
    case = parity.Case("lpips", "torch", lambda files, words: expected, 1e-5, ("random0.png", "random1.png"), ("", ""),
                       options={"reference": "random0.png"})  # fmt: skip
    (row,) = parity.compare(case, data, [], weights=weights)
    assert row.agrees and expected[1] < -0.01


def parity_of_lpips(x, y):
    heads = load_file(HEADS)
    with torch.no_grad():
        return lpips_distance(x, y, [heads[f"lin{i}"] for i in range(5)]).item()


def test_a_picture_of_another_hash_is_refused(data):
    (data / "random0.png").write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the picture that was published"):
        parity.fetch_picture(data, "random0.png")


def test_what_cannot_be_fetched_is_left_out_and_is_no_disagreement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_parity.py", "imagereward", "--output", str(tmp_path / "parity.md")])
    assert parity.main() == 0
    assert "imagereward is left out: " in capsys.readouterr().err
    page = (tmp_path / "parity.md").read_text()
    assert page.startswith("# Parity") and "| `imagereward` | published |" in page and "not scored" in page


def test_the_cases_fit():
    for case in parity.CASES:
        assert len(case.pictures) == len(case.prompts) and len(case.printed) in (0, len(case.pictures))
        assert set(case.pictures) <= parity.PICTURES.keys() and (case.printed or case.theirs)
    probabilities = CASES["open-clip"].of_scores(torch.tensor([0.3, 0.25, 0.2]))
    assert probabilities.sum().item() == pytest.approx(1) and probabilities[0] > 0.99


# ---------------------------------------------------------------------------------------------- random checkpoints


def test_every_reward_with_weights_of_its_own_has_a_case():
    """That is, one whose files are pinned, or whose size is known."""
    for name, entry in REWARDS.items():
        assert (name in CASES) == bool(entry.weights or (entry.fetch and entry.memory_mb)), name
    assert CASES.keys() == parity.CHECKPOINTS.keys()


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", CASES)
def test_a_random_checkpoint_scores_as_the_model_that_it_comes_from(name):
    row = parity.compare_random(name)
    assert row.agrees and row.gap < row.most, row


def test_a_reward_that_differs_from_its_model_disagrees(monkeypatch, capsys):
    true = parity.CHECKPOINTS["cyclereward"]

    def another(folder):
        made = true(folder)
        return made._replace(forward=lambda file, prompt: 1.001 * made.forward(file, prompt))

    monkeypatch.setitem(parity.CHECKPOINTS, "cyclereward", another)
    monkeypatch.setattr("sys.argv", ["check_parity.py", "--random", "cyclereward"])
    assert parity.main() == 1 and "**DISAGREES**" in capsys.readouterr().out


def test_the_page_of_the_docs_tells_of_every_case():
    page = PAGE.read_text()
    assert page.startswith(parity.HEAD.replace("{flag}", " --random"))
    for case in parity.CASES:
        number = re.search(rf"\n\| `{re.escape(case.name)}` \| random \| .* \| (\S+) \| agrees \(", page)
        assert number and float(number[1]) < 1e-4, case.name
        assert f"\n| `{case.reward}` | published | {parity.wanted(case)} |  | not scored here |" in page


@pytest.mark.network
@pytest.mark.parametrize("name", CASES)
def test_published_weights_agree(name, tmp_path):
    for row in parity.compare(CASES[name], parity.DATA, parity.random_pictures(tmp_path)):
        if row.agrees is None:
            pytest.skip(f"nothing to compare {name} with: {row.why}")
        assert row.agrees, row
