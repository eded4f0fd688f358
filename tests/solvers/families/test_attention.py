"""xformers is used where it serves, on one network alone; what runs here is a stand-in for it."""

import os
import re
import time

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from solvers.families import attention as module
from solvers.families.attention import ATTENTION, FLAG, AttentionShape, attention, choose, deterministic, obstacle, sdpa
from tests.support import pipelines

SMALL = (AttentionShape(64, 64, 2, 8), AttentionShape(64, 7, 2, 8))


def slow(q, k, v):
    time.sleep(0.01)
    return sdpa(q, k, v)


def wrong(q, k, v):
    return sdpa(q, k, 1.1 * v)


def failing(q, k, v):
    raise NotImplementedError("No operator found for `memory_efficient_attention_backward`\nwith inputs:")


def forward_only(q, k, v):
    return sdpa(q, k, v).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("theirs", "says"),
    [(slow, "sdpa .* ms, xformers"), (wrong, "gradient is"), (failing, "No operator found .*backward`$")]
    + [(forward_only, "fails on")],
)
def test_sdpa_stays_where_xformers_is_slower_wrong_or_fails(monkeypatch, theirs, says, dtype):
    monkeypatch.setitem(ATTENTION, "xformers", theirs)
    verdict = choose("cpu", dtype, SMALL)
    assert verdict.backend == "sdpa"
    assert re.search(says, verdict.why)


def test_xformers_is_chosen_where_it_is_no_slower(monkeypatch):
    monkeypatch.setitem(ATTENTION, "xformers", sdpa)
    monkeypatch.setitem(ATTENTION, "sdpa", slow)
    assert choose("cpu", torch.float32, SMALL).backend == "xformers"


def test_sdpa_is_attention():
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (5, 7, 7))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5).softmax(-1)
    torch.testing.assert_close(sdpa(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v))


def test_the_obstacle_is_one_sentence_with_the_remedy(monkeypatch):
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    assert obstacle().startswith("xformers is not installed: pip install 'difftune[xformers]'") and FLAG in obstacle()
    monkeypatch.setattr(module.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU" in obstacle() and FLAG in obstacle()


def test_attention_refuses_what_cannot_run_and_names_what_is_known(monkeypatch):
    unet = pipelines.unet()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="xformers (is not installed|needs a CUDA GPU)"), attention(unet, "xformers"):
        pass
    with pytest.raises(ValueError, match="no attention 'flash'; known: sdpa, xformers"), attention(unet, "flash"):
        pass


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


def leaking(network):
    """What diffusers does on a GPU, and what `set_attention_backend` does besides: the backend of the whole process."""
    for layer in module_layers(network):
        if isinstance(layer.processor, AttnProcessor2_0):
            layer.set_processor(XFormersAttnProcessor())
        else:
            layer.processor._attention_backend = AttentionBackendName.XFORMERS
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.XFORMERS)


def module_layers(network):
    return [m for m in network.modules() if isinstance(m, module.Attention | module.AttentionModuleMixin)]


def state(network):
    return [(layer.processor, vars(layer.processor).get("_attention_backend")) for layer in module_layers(network)]


@pytest.mark.parametrize("make", [pipelines.unet, flux])
def test_one_network_is_changed_and_restored_and_no_other(monkeypatch, make):
    network, other = make(), make()
    monkeypatch.setattr(module, "obstacle", lambda: None)
    monkeypatch.setattr(type(network), "enable_xformers_memory_efficient_attention", leaking)
    active, before, others = _AttentionBackendRegistry._active_backend, state(network), state(other)
    assert before
    with pytest.raises(ZeroDivisionError), attention(network, "xformers"):
        assert all(
            isinstance(processor, XFormersAttnProcessor) or own == AttentionBackendName.XFORMERS
            for processor, own in state(network)
        )
        assert _AttentionBackendRegistry._active_backend == active
        assert state(other) == others
        raise ZeroDivisionError
    assert state(network) == before and _AttentionBackendRegistry._active_backend == active


def test_sdpa_changes_nothing():
    network = pipelines.unet()
    before = state(network)
    with attention(network):
        assert state(network) == before


@pytest.mark.parametrize("was", [False, True])
def test_deterministic_is_restored(monkeypatch, was):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(was, warn_only=was)
    torch.backends.cudnn.benchmark = True
    try:
        with pytest.raises(ZeroDivisionError), deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled() and not torch.backends.cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled() == was
        assert torch.is_deterministic_algorithms_warn_only_enabled() == was and torch.backends.cudnn.benchmark
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_deterministic_can_be_off():
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_the_probe_decides_and_says_why(dtype):
    if reason := obstacle():
        pytest.skip(reason)
    verdict = choose("cuda", dtype)
    assert verdict.backend in ATTENTION and verdict.why
