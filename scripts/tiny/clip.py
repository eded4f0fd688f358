"""Stage `clip`: `tiny-clip`, trained before all image models, whose text encoder is its text tower."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from rewards.world import grammar
from rewards.world.render import Scene
from scripts.tiny import scenes, vae, words
from scripts.tiny.fit import Fit, Setup

WIDTH, LAYERS, HEADS, RATIO = 128, 3, 4, 3
EDITS = 7  # false captions of each picture beside those of the batch


def config() -> dict:
    """The model in open_clip's words."""
    tokenizer = words.tokenizer()
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 64, "layers": 5, "width": 96, "patch_size": 8, "head_width": 32},
        "text_cfg": {
            "context_length": words.LENGTH,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "mlp_ratio": RATIO,
            "hf_tokenizer_name": "tiny-clip",
            "pool_type": "eos",
            "vocab_size": len(tokenizer),
            "eos_id": tokenizer.eos_token_id,
        },
    }


def make(setup: Setup) -> CLIP:
    setup.seeded("clip", "weights")
    return CLIP(**config()).to(setup.device)


@lru_cache(maxsize=1)
def trained(setup: Setup, steps: int = 6000) -> CLIP:
    """Each picture against its caption, seven false captions one word or one swap away, and the batch's other ones."""
    model = make(setup)
    Fit(setup, "clip", {"clip": model}, lambda step: contrast(model, setup, step), steps, 1e-3).run()
    return model.eval()


@lru_cache(maxsize=1)
def text_encoder(setup: Setup) -> CLIPTextModel:
    """The text tower in transformers' words, frozen."""
    tokenizer = words.tokenizer()
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=RATIO * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            hidden_act="gelu",
            max_position_embeddings=words.LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.load_state_dict(to_transformers(trained(setup).state_dict()))
    return model.to(setup.device).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ the loss


def contrast(model: CLIP, setup: Setup, step: int) -> Tensor:
    """InfoNCE in both directions; a caption of the batch that holds of a picture too is not a false one of it."""
    rng = np.random.default_rng([setup.seed, 3, step])
    shard = scenes.drawn(setup.seed, int(rng.choice(scenes.window(setup, step))))
    chosen = rng.choice(len(shard.scenes), setup.batch, replace=False)
    captions, worlds = [shard.captions[i] for i in chosen], [shard.scenes[i] for i in chosen]
    x = seen(shard.images[chosen], setup)
    texts = list(map(str, captions))
    wrong = [false(rng, caption, scene) for caption, scene in zip(captions, worlds, strict=True)]
    ids = words.tokens(texts + [text for several in wrong for text in several]).to(setup.device)
    image, text = model.encode_image(x, normalize=True), model.encode_text(ids, normalize=True)
    scale, true = model.logit_scale.exp().clamp(max=100), torch.arange(len(x), device=x.device)
    also = torch.tensor([[grammar.holds(c, s) for c in captions] for s in worlds]).fill_diagonal_(False)
    others = (scale * image @ text[: len(x)].T).masked_fill(also.to(x.device), -torch.inf)
    own = scale * torch.einsum("bd,bkd->bk", image, text[len(x) :].view(len(x), EDITS, -1))
    return F.cross_entropy(torch.cat([others, own], 1), true) + 0.5 * F.cross_entropy(others.T, true)


def false(rng: np.random.Generator, caption: grammar.Caption, scene: Scene) -> list[str]:
    """EDITS false captions: the swaps, then one-word changes in random order, repeated where there are too few."""
    changed = grammar.edits(caption, scene)
    texts = (grammar.swaps(caption, scene) + [changed[i] for i in rng.permutation(len(changed))])[:EDITS]
    return (texts * EDITS)[:EDITS]


# ------------------------------------------------------------------------------------------------ what it sees


@torch.no_grad()
def seen(images: Tensor, setup: Setup) -> Tensor:
    """Pictures as models draw them: uint8 to [-1, 1], a third through the VAE, then some of a wobble, a little of
    another picture, a blur and noise."""
    x = scenes.pixels(images, setup)
    rough = torch.rand(len(x), device=x.device) < 0.33
    if rough.any():
        x[rough] = vae.through(vae.trained(setup), x[rough])
    x = torch.where(_some(x, 0.5), wobbled(x), x)
    x = x.lerp(x.roll(1, 0), _some(x, 0.3) * 0.25 * torch.rand(len(x), 1, 1, 1, device=x.device))
    x = torch.where(_some(x, 0.3), F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1), x)
    return x + _some(x, 0.6) * 0.15 * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(x)


def _some(x: Tensor, share: float) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, device=x.device) < share


def wobbled(x: Tensor, pixels: float = 1.5) -> Tensor:
    """Each picture moved and bent by a smooth random field of at most about so many pixels."""
    field = pixels * 2 / x.shape[-1] * torch.randn(len(x), 2, 4, 4, device=x.device)
    field = F.interpolate(field, x.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3, device=x.device).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, still + field, padding_mode="border", align_corners=False)


# ------------------------------------------------------------------------------------------------ two layouts

NAMES = (  # of a layer: open_clip's, transformers'
    ("ln_1", "layer_norm1"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
ENDS = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.weight", "final_layer_norm.weight"),
    ("ln_final.bias", "final_layer_norm.bias"),
)


def _pairs() -> Sequence[tuple[str, str]]:
    layers = [
        (f"transformer.resblocks.{i}.{a}.{part}", f"encoder.layers.{i}.{b}.{part}")
        for i in range(LAYERS)
        for a, b in NAMES
        for part in ("weight", "bias")
    ]
    return [*ENDS, *layers]


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text tower as a CLIPTextModel's state."""
    found = {b: state[a] for a, b in _pairs()}
    for i in range(LAYERS):
        for part in ("weight", "bias"):
            three = state[f"transformer.resblocks.{i}.attn.in_proj_{part}"].chunk(3)
            for letter, value in zip("qkv", three, strict=True):
                found[f"encoder.layers.{i}.self_attn.{letter}_proj.{part}"] = value
    return found


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModel's state as open_clip's text tower, without the projection."""
    found = {a: state[b] for a, b in _pairs()}
    for i in range(LAYERS):
        for part in ("weight", "bias"):
            three = [state[f"encoder.layers.{i}.self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            found[f"transformer.resblocks.{i}.attn.in_proj_{part}"] = torch.cat(three)
    return found


def projection(states: Tensor, embeddings: Tensor) -> Tensor:
    """The text projection (D, E) that takes final states (N, D) nearest to embeddings (N, E)."""
    return torch.linalg.lstsq(states, embeddings).solution


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {f"clip.{name}": value for name, value in model.named_parameters()}
