"""Bridges to other libraries, on small modules that look as theirs do; torchmetrics itself where it is installed."""

import math
import os
import pickle
import types
from importlib import util

import pytest
import torch

from rewards.learned import bridges
from rewards.learned.bridges import FORCE
from rewards.registry import REWARDS, entry, load

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Metric(torch.nn.Module):
    """As pyiqa's InferenceModel is used."""

    def __init__(self, name, device, as_loss=False, loss_reduction="mean"):
        super().__init__()
        self.metric_mode, self.lower_better = ("FR" if name == "psnr" else "NR"), name in ("niqe", "tv")
        self.name, self.as_loss, self.reduction = name, as_loss, loss_reduction
        self.forced = os.environ.get(FORCE)

    def forward(self, x, y=None):
        assert x.min() >= 0 and x.max() <= 1
        with torch.set_grad_enabled(self.as_loss):
            found = x.mean((1, 2, 3)) if y is None else -(x - y).square().mean((1, 2, 3))
        return found if self.reduction == "none" or not self.as_loss else found.mean()


def create(name, device, **options):
    if name == "bad":
        raise pickle.UnpicklingError("code")
    return Metric(name, device, **options)


@pytest.fixture
def pyiqa(monkeypatch):
    names = ["musiq", "niqe", "psnr", "tv", "bad", "fid"]
    library = types.SimpleNamespace(list_models=lambda: names, create_metric=create)
    monkeypatch.setattr(bridges.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bridges, "import_module", lambda name: library)


def test_metrics_of_pyiqa_rise_with_quality_and_are_read_without_running_code(pyiqa):
    x = (IMAGES * 1.3 - 0.15).requires_grad_()
    better = load("pyiqa", metric="musiq")
    assert better.network.forced == "1" and FORCE not in os.environ
    scores = better(x, [""] * 3)
    torch.testing.assert_close(scores, x.clamp(0, 1).mean((1, 2, 3)))
    assert torch.autograd.grad(scores.sum(), x)[0].abs().sum() > 0
    torch.testing.assert_close(load("pyiqa[metric=tv]")(x, [""] * 3), -scores)
    niqe = load("pyiqa", metric="niqe")
    assert not niqe.differentiable and not niqe(x, [""] * 3).requires_grad
    near = load("pyiqa", metric="psnr", reference=IMAGES[1])(IMAGES, [""] * 3)
    assert near[1] == 0 and near.argmax() == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "musik"}, "no metric of pyiqa 'musik' .did you mean 'musiq'"),
        ({"metric": "fid"}, "fid is of a set of pictures"),
        ({"metric": "bad"}, "pyiqa's weights of bad hold more than tensors"),
        ({"metric": "psnr"}, "psnr compares with a picture: give reference=FILE"),
        ({"metric": "musiq", "reference": IMAGES[0]}, "leave the reference out"),
    ],
)
def test_metrics_that_cannot_be_rewards_are_refused(pyiqa, options, said):
    with pytest.raises(ValueError, match=said):
        load("pyiqa", **options)
    assert FORCE not in os.environ


@pytest.mark.parametrize("name", ["pyiqa", "torchmetrics"])
def test_a_library_that_is_not_installed_is_an_extra(name, monkeypatch):
    monkeypatch.setattr(bridges.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'difftune\[{name}\]'"):
        load(name, metric="x")
    assert REWARDS[name].extra == name and REWARDS["pyiqa"].noncommercial


def test_a_metric_has_facts_of_its_own():
    assert entry("pyiqa[metric=musiq]").range == (0, 100) and entry("pyiqa[metric=musiq]").differentiable
    assert entry("pyiqa[metric=niqe]").range == (-100, 0) and not entry("pyiqa[metric=niqe]").differentiable
    assert entry("pyiqa[metric=psnr]").range == entry("pyiqa").range == (-math.inf, math.inf)
    assert set(bridges.NO_GRADIENT).isdisjoint(bridges.OF_SETS)


# ------------------------------------------------------------------------------------------------ pyiqa itself


@pytest.mark.slow
@pytest.mark.skipif(util.find_spec("pyiqa") is None, reason="needs the package 'pyiqa', an extra of its own")
def test_pyiqa_itself(tmp_path, monkeypatch):
    """A metric without weights against torch, one with random weights in the published layout, and a pickle of code."""
    from pyiqa.archs.cnniqa_arch import CNNIQA
    from pyiqa.utils import download_util

    near = load("pyiqa", metric="psnr", reference=IMAGES[0])(IMAGES[1:], ["", ""])
    expected = -10 * (IMAGES[1:] - IMAGES[0]).square().mean((1, 2, 3)).log10()
    torch.testing.assert_close(near, expected, rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    network = CNNIQA(pretrained=None).eval()
    torch.save({"params": network.state_dict()}, tmp_path / "CNNIQA_koniq10k-e6f14c91.pth")
    x = IMAGES.clone().requires_grad_()
    scores = load("pyiqa", metric="cnniqa")(x, [""] * 3)
    torch.testing.assert_close(scores, network(IMAGES).squeeze(1), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(scores.sum(), x)[0].abs().sum() > 0
    torch.save({"params": Code()}, tmp_path / "CNNIQA_koniq10k-e6f14c91.pth")
    with pytest.raises(ValueError, match="pyiqa's weights of cnniqa hold more than tensors"):
        load("pyiqa", metric="cnniqa")


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return pytest.fail, ("a pickle's code was run",)


@pytest.fixture
def functional(monkeypatch):
    def peak_signal(preds, target, data_range=None):
        return -(preds - target).square().mean() * data_range

    def total_variation(img, reduction="sum"):
        return img.diff(dim=-1).abs().sum()

    def image_gradients(img):
        return img, img

    def perceptual(img1, img2, net_type="alex", normalize=False):
        x, y = (2 * img - 1 if normalize else img for img in (img1, img2))
        return (x - y).square().mean()

    def multiscale(preds, target, normalize="relu"):
        return preds.mean() if normalize == "relu" else None

    def distortion(preds, ms, pan, window=7):
        return preds.mean()

    functions = (peak_signal, total_variation, image_gradients, perceptual, multiscale, distortion)
    library = types.SimpleNamespace(**{f.__name__: f for f in functions})
    monkeypatch.setattr(bridges.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bridges, "import_module", lambda name: library)


def test_functions_of_torchmetrics_are_called_on_each_picture(functional):
    found = load("torchmetrics", metric="peak_signal", reference=IMAGES[2])(IMAGES, [""] * 3)
    torch.testing.assert_close(found, -(IMAGES - IMAGES[2]).square().mean((1, 2, 3)))
    found = load("torchmetrics", metric="peak_signal", reference=IMAGES[2], options={"data_range": 2.0})
    torch.testing.assert_close(found(IMAGES, [""] * 3), -2 * (IMAGES - IMAGES[2]).square().mean((1, 2, 3)))
    found = load("torchmetrics", metric="total_variation")(IMAGES, [""] * 3)
    torch.testing.assert_close(found, -IMAGES.diff(dim=-1).abs().sum((1, 2, 3)))
    with pytest.raises(ValueError, match="gives no single number"):
        load("torchmetrics", metric="image_gradients")(IMAGES, [""] * 3)
    with pytest.raises(ValueError, match="did you mean 'total_variation'"):
        load("torchmetrics", metric="total_varation")


def test_functions_of_torchmetrics_are_told_the_range_or_refused(functional):
    """normalize=True where it says that pictures are in [0, 1]; what needs a third picture is no reward."""
    found = load("torchmetrics", metric="perceptual", reference=IMAGES[2])(IMAGES, [""] * 3)
    torch.testing.assert_close(found, 4 * (IMAGES - IMAGES[2]).square().mean((1, 2, 3)))
    signed = load("torchmetrics", metric="perceptual", reference=IMAGES[2], options={"normalize": False})
    torch.testing.assert_close(4 * signed(IMAGES, [""] * 3), found)
    found = load("torchmetrics", metric="multiscale", reference=IMAGES[2])(IMAGES, [""] * 3)
    torch.testing.assert_close(found, IMAGES.mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"^distortion needs ms and pan besides a picture, which a reward does not"):
        load("torchmetrics", metric="distortion")


@pytest.mark.skipif(util.find_spec("torchmetrics") is None, reason="needs the package 'torchmetrics'")
def test_torchmetrics_itself():
    reward = load("torchmetrics", metric="structural_similarity_index_measure", reference=IMAGES[0])
    x = IMAGES.clone().requires_grad_()
    scores = reward(x, [""] * 3)
    assert scores[0].item() == pytest.approx(1.0, abs=1e-5) and (scores[1:] < 0.9).all()
    assert torch.autograd.grad(scores[1:].sum(), x)[0][1:].abs().sum() > 0
    variation = load("torchmetrics", metric="total_variation")(IMAGES, [""] * 3)
    expected = IMAGES.diff(dim=-1).abs().sum((1, 2, 3)) + IMAGES.diff(dim=-2).abs().sum((1, 2, 3))
    torch.testing.assert_close(variation, -expected)
