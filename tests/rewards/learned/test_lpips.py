"""LPIPS against its formula as its authors wrote it, on torchvision's AlexNet."""

import pytest
import torch

from rewards.learned.lpips import HEADS, LPIPS
from rewards.learned.reference import Reference
from rewards.registry import load
from tests.support import checkpoints
from tests.support.references import lpips_distance

IMAGES = torch.rand(2, 3, 72, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return checkpoints.alexnet_file(tmp_path_factory.mktemp("alexnet"))


@torch.no_grad()
def test_lpips_is_its_authors_formula(file):
    from safetensors.torch import load_file

    heads = load_file(HEADS)
    assert [len(heads[f"lin{i}"]) for i in range(5)] == [64, 192, 384, 256, 256]
    assert all((heads[f"lin{i}"] >= 0).all() for i in range(5))
    reference = torch.rand(3, 72, 96, generator=torch.Generator().manual_seed(1))
    found = load("lpips", weights=file, reference=reference)(IMAGES, ["", ""])
    expected = lpips_distance(IMAGES, reference.expand(2, -1, -1, -1), [heads[f"lin{i}"] for i in range(5)])
    torch.testing.assert_close(found, -expected, rtol=1e-5, atol=1e-6)
    same = LPIPS(IMAGES[0], file)(IMAGES, ["", ""])
    assert same[0] == 0 > same[1]


def test_a_reference_of_a_file_or_of_each_prompt(tmp_path):
    from PIL import Image

    Image.new("RGB", (96, 72), (51, 102, 204)).save(tmp_path / "a.png")
    found = Reference({"a": str(tmp_path / "a.png"), "b": IMAGES[1]})(IMAGES, ["b", "a"])
    torch.testing.assert_close(found[0], IMAGES[1])
    torch.testing.assert_close(found[1, :, 0, 0], torch.tensor([0.2, 0.4, 0.8]))
    assert Reference(torch.ones(3, 8, 8))(IMAGES, ["", ""]).shape == IMAGES.shape
    with pytest.raises(ValueError, match="there is no reference picture of the prompt 'c'"):
        Reference({"a": IMAGES[0]})(IMAGES[:1], ["c"])
    with pytest.raises(ValueError, match="cannot read the reference picture"):
        Reference(str(tmp_path / "none.png"))


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="the weights do not fit AlexNet"):
        LPIPS(IMAGES[0], tmp_path / "other.pth")
