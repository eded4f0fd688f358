"""A LoRA that grows along a run: nothing of it is the base and all of it the LoRA, to the bit; between, the mixture."""

import json

import pytest
import torch

from difftune.configs.images import SampleConfig
from difftune.pipelines import lora
from difftune.pipelines.annealed import SHARES, annealed
from difftune.pipelines.generate import Sampling, generate, generate_batches
from guidance.methods.cfg import CFG
from tests.support import dits, pipelines


def tuned(make):
    pipe = make()
    lora.add(pipe, 2, seed=1)
    with torch.no_grad():
        for weight in lora.weights(lora.network_of(pipe)).values():
            weight += 0.1
    return pipe


def drawn(pipe, steps=4):
    kw = {"prompt": "red", "num_inference_steps": steps, "output_type": "latent", "guidance_scale": 3.0}
    return pipe(**kw, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("make", [pipelines.sd, dits.sd3])
def test_no_share_is_the_base_and_the_whole_share_the_lora_bit_for_bit(make):
    pipe = tuned(make)
    network = lora.network_of(pipe)
    whole = drawn(pipe)
    with lora.off(network):
        base = drawn(pipe)
    assert not torch.equal(whole, base)
    for weight, expected in ((0.0, base), (1.0, whole)):
        with annealed(network, lambda done, weight=weight: weight, 4) as extra:
            assert torch.equal(drawn(pipe), expected)
        assert extra.rows == 0
    assert torch.equal(drawn(pipe), whole) and "forward" not in vars(network)


def test_between_the_outputs_are_mixed_by_the_step():
    pipe = tuned(pipelines.sd)
    unet, met = pipe.unet, []
    x, text = torch.ones(2, 4, 8, 8), torch.ones(2, 3, unet.config.cross_attention_dim)
    with torch.no_grad():
        whole = unet(x, 900, text).sample
        with lora.off(unet):
            base = unet(x, 900, text).sample
        with annealed(unet, lambda done: met.append(done) or 0.25 + done, 3) as extra:
            first = unet(x, 900, encoder_hidden_states=text).sample
            assert torch.equal(first, unet(x, 900, text, return_dict=False)[0])  # the step again: CFG's other branch
            unet(x, timestep=500, encoder_hidden_states=text)
            unet(x, 100, text)
    assert torch.equal(first, 0.25 * whole + 0.75 * base)
    assert met == [0, 0, 0.5, 1] and extra.rows == 8


@pytest.mark.parametrize(
    ("name", "shares"),
    [("linear", [0, 0.25, 0.5, 0.6, 1]), ("power", [0, 0.0625, 0.25, 0.36, 1]), ("switch", [0, 0, 0, 1, 1])],
)
def test_shares_go_from_0_to_1(name, shares):
    assert [SHARES[name](done) for done in (0, 0.25, 0.5, 0.6, 1)] == pytest.approx(shares)


def test_sample_counts_what_it_costs_and_wants_a_lora(tmp_path):
    pipe = tuned(pipelines.sd)
    (plain,) = generate_batches(pipe, ["red"], [0], CFG(3.0), Sampling(4))
    (grown,) = generate_batches(pipe, ["red"], [0], CFG(3.0), Sampling(4, lora_anneal="linear"))
    assert plain.nfe == 8 and grown.nfe == 8 + 4  # at two of four steps both networks are asked, two branches each
    assert not torch.equal(plain.images, grown.images)
    with pytest.raises(ValueError, match="--lora_anneal lets a LoRA grow"):
        next(generate_batches(pipelines.sd(), ["red"], [0], CFG(3.0), Sampling(4, lora_anneal="linear")))
    with pytest.raises(ValueError, match="no lora_anneal 'linaer'"):
        SampleConfig(model="tiny", prompt=["red"], output_dir="x", lora_anneal="linaer")
    lora.save(pipe, tmp_path / "lora")
    pipelines.sd().save_pretrained(tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "lora": str(tmp_path / "lora"), "prompt": ["red"]}
    generate(SampleConfig(**settings, num_inference_steps=3, output_dir=str(tmp_path / "out"), lora_anneal="switch"))
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["settings"]["lora_anneal"] == "switch"
