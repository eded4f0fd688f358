"""LoRA: what is saved loads in a fresh pipeline and gives the same output."""

import pytest
import torch
from safetensors.torch import load_file

from difftune import lora
from difftune.errors import UserError
from tests import pipelines


def perturbed(pipe, **options):
    """An adapter whose update is not zero."""
    for i, weight in enumerate(lora.add(pipe, **options).values()):
        weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return pipe


def output(pipe) -> torch.Tensor:
    inputs = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(2, 4, 8, 8, generator=inputs),
        torch.randn(2, 8, pipe.unet.config.cross_attention_dim, generator=inputs),
    )
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return pipe.unet(x, 500, text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("make", [pipelines.sd, pipelines.sdxl])
@pytest.mark.parametrize("alpha", [None, 8])
def test_saved_adapter_loads_into_a_fresh_pipeline(tmp_path, make, alpha):
    pipe = perturbed(make(), rank=2, alpha=alpha)
    path = lora.save(pipe, tmp_path)
    fresh = make()
    base = output(fresh)
    fresh.load_lora_weights(tmp_path)
    loaded = [name for name, _ in fresh.unet.named_parameters() if "lora" in name]
    assert len(loaded) == len(load_file(path)) == len(lora.weights(pipe.unet))
    assert (output(fresh) - output(pipe)).abs().max() <= 1e-6
    assert (output(fresh) - base).abs().max() > 1e-3
    assert [p.name for p in tmp_path.iterdir()] == [lora.WEIGHTS]


def test_a_new_adapter_changes_nothing_and_is_seeded():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pipe, again, other = pipelines.sd(), pipelines.sd(), pipelines.sd()
    base = output(pipe)
    weights, same, different = lora.add(pipe, seed=1), lora.add(again, seed=1), lora.add(other, seed=2)
    assert torch.equal(output(pipe), base)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[k], same[k]) for k in weights)
    assert not all(torch.equal(weights[k], different[k]) for k in weights)


def test_only_the_adapter_is_trainable_and_it_is_float32():
    pipe = pipelines.sd()
    pipe.to(dtype=torch.bfloat16)
    weights = lora.add(pipe, rank=4)
    layers = {name.rsplit(".lora_", 1)[0].rsplit("attn", 1)[1][2:] for name in weights}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {w.dtype for w in weights.values()} == {torch.float32}
    trained = [
        n for c in ("unet", "vae", "text_encoder") for n, p in pipe.components[c].named_parameters() if p.requires_grad
    ]
    assert trained == list(weights)


def test_sd15_has_the_papers_number_of_weights():
    """Rank 4 on the attention of Stable Diffusion 1.5: 797,184, from its published sizes, on no device."""
    with torch.device("meta"):
        pipe = pipelines.sd(unet_config={"sample_size": 64, "layers_per_block": 2, "norm_num_groups": 32,
            "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3})  # fmt: skip
        assert sum(w.numel() for w in lora.add(pipe, rank=4).values()) == 797_184


def test_a_second_adapter_and_foreign_weights_are_refused():
    pipe = pipelines.sd()
    weights = lora.add(pipe, rank=2)
    with pytest.raises(UserError, match="adapters already"):
        lora.add(pipe)
    with pytest.raises(UserError, match="not of this model and rank"):
        lora.load(pipe.unet, {name: weight[:1] for name, weight in weights.items()})
