"""attach() beside the IP-Adapters of transformers; those of UNets are tested with every method in `test_registry`."""

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

from guidance.attach.handle import attach
from guidance.methods.catalogue import CFG, NAG, PAG, SLG, Plain
from tests.guidance.methods.test_conformance import SCALE, STEPS, Settling, close, run
from tests.support.dits import TEXT, flux, sd3


def normal(*shape):
    return 0.5 * torch.randn(*shape)


def flux_prompted():
    """Four tokens of a picture, in the attention of the double-stream block."""
    pipe = flux()
    width = pipe.transformer.inner_dim
    norm = {"norm.weight": torch.ones(TEXT), "norm.bias": torch.zeros(TEXT)}
    projection = {"proj.weight": normal(4 * TEXT, 12), "proj.bias": normal(4 * TEXT), **norm}
    added = {f"0.to_{k}_ip.weight": normal(width, TEXT) for k in "kv"}
    added |= {f"0.to_{k}_ip.bias": normal(width) for k in "kv"}
    pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": added}])
    picture = normal(1, 1, 12)
    return pipe, {"ip_adapter_image_embeds": [picture], "negative_ip_adapter_image_embeds": [-picture]}


def sd3_prompted():
    """A projection that reads the timestep, and an attention of its own in each block."""
    pipe = sd3()
    heads = {"hidden_size": 16, "ip_hidden_states_dim": 16, "head_dim": 8, "timesteps_emb_dim": 64}
    attention = SD3IPAdapterJointAttnProcessor2_0(**heads).state_dict()
    sizes = {"embed_dim": 12, "output_dim": 16, "hidden_dim": 64, "heads": 1, "num_queries": 4}
    projection = IPAdapterTimeImageProjection(**sizes, timestep_in_dim=320).state_dict()
    count = len(pipe.transformer.attn_processors)
    added = {f"{i}.{name}": value for i in range(count) for name, value in attention.items()}
    state = {"image_proj": projection, "ip_adapter": added}
    pipe.transformer._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
    return pipe, {"ip_adapter_image_embeds": normal(2, 5, 12)}


@pytest.mark.parametrize(
    "kind, make", [("flux", flux_prompted), pytest.param("sd3", sd3_prompted, marks=pytest.mark.slow)]
)
def test_a_picture_as_a_prompt(kind, make):
    """Bit for bit under CFG, each branch with its own picture; a patch in the adapter's attention is refused."""
    pipe, more = make()
    alone = {name: each[1:] if kind == "sd3" else each for name, each in more.items()}  # SD3's are of both branches
    stock, plain = run(kind, pipe, **more), run(kind, pipe, scale=1.0, **alone)
    other = {name: [2 * each[0]] if kind == "flux" else 2 * each for name, each in more.items()}
    with attach(pipe, CFG(SCALE)) as handle:
        assert torch.equal(run(kind, pipe, **more), stock) and handle.nfe == 4 * STEPS
        assert not torch.allclose(run(kind, pipe, **other), stock, atol=1e-3)
    with attach(pipe, Plain()):
        close(run(kind, pipe, **more), plain)
    with attach(pipe, Settling((9, 1))):
        close(run(kind, pipe, **more)[:1], stock[:1])
    with attach(pipe, SLG(SCALE, layers="transformer_blocks.0")):
        assert not torch.allclose(run(kind, pipe, **more), stock, atol=1e-3)
    for method in (PAG(2.0, layers="transformer_blocks.0"), NAG(4.0, normal(1, 6, TEXT))):
        with (
            attach(pipe, method),
            pytest.raises(ValueError, match="attends by .*IPAdapter.*without a patch"),
        ):
            run(kind, pipe, **more)
    assert torch.equal(run(kind, pipe, **more), stock)
