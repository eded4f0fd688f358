"""Whatever resizes pictures or latents moves nothing: the result for a mirrored picture is the mirrored result."""

import pytest
import torch
from PIL import Image

from difftune.files.pictures import read_fitted
from guidance.methods.frequency import low
from rewards.learned.preprocess import Preprocess
from rewards.world.oracle import _seen


def picture(tmp_path):
    def reading(x: torch.Tensor) -> torch.Tensor:
        pixels = (x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "it.png")
        return read_fitted(tmp_path / "it.png", 24, 32)[None]

    return reading


RESIZES = {
    "fdg": lambda folder: low,
    "crop": lambda folder: Preprocess(32, "crop").pixels,
    "pad": lambda folder: Preprocess(32, "pad").pixels,
    "squash": lambda folder: Preprocess(32, "squash", interpolation="bilinear").pixels,
    "pictures": picture,
    "oracle": lambda folder: lambda x: torch.stack([torch.from_numpy(a) for a in _seen(x[..., :72])]).movedim(-1, 1),
}


@pytest.mark.parametrize("name", RESIZES)
def test_mirrored_in_mirrored_out(name, tmp_path):
    resize = RESIZES[name](tmp_path)
    x = torch.rand(1, 3, 72, 72 if name == "oracle" else 96, generator=torch.Generator().manual_seed(0))
    for axis in (-1, -2):
        torch.testing.assert_close(resize(x.flip(axis)), resize(x).flip(axis), rtol=0, atol=1e-5)
