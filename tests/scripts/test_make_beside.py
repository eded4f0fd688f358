"""What scripts/make_beside.py tries on quantised weights, where the packages that quantise are at hand."""

import pytest

from solvers.latent import LatentModel
from tests.support.benches import script


@pytest.fixture(scope="module")
def made():
    with script("make_beside") as module:
        yield module


@pytest.mark.parametrize("loader, package", (("torchao, int8", "torchao"), ("GGUF, Q8_0", "gguf")))
@pytest.mark.slow
def test_quantised_weights(made, monkeypatch, loader, package):
    pytest.importorskip(package)
    monkeypatch.setattr(LatentModel, "size", lambda self, height=None, width=None: (height or 32, width or 32))
    assert made.quantised("flux", made.LOADERS[loader]) == "bit-equal, trains"


def test_a_loader_that_fails_is_told(made):
    def fail(network, folder):
        raise RuntimeError("No GPU found. A GPU is needed for quantization.")

    assert made.quantised("flux", fail) == "diffusers: No GPU found. A GPU is needed for quantization."
