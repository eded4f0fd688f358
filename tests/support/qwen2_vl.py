"""HPSv3 written out from its description, in float64, sharing no code with `rewards`: the chat, the resize, the
patches, the positions, Qwen2-VL's two transformers and the head."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

BUDGET, PATCH, BLOCK = 256 * 28 * 28, 14, 28  # pixels of a picture, and the sides of a patch and of a block of four
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATE = jinja2.Template(  # Qwen2-VL's chat template, but for films and for pictures by number
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
AFTER = "\n\nEND\n"  # of the authors' question


def chat(question: str) -> str:
    """The authors' one turn: the picture, then the question and its end."""
    content = [{"type": "image"}, {"type": "text", "text": question + AFTER}]
    return TEMPLATE.render(messages=[{"role": "user", "content": content}])


# ------------------------------------------------------------------------------------------------ pictures


def sides(height: int, width: int) -> tuple[int, int]:
    """Qwen's rule for least = most = 200,704 pixels."""
    rows, columns = round(height / BLOCK), round(width / BLOCK)
    shrink = math.sqrt(height * width / BUDGET)
    if rows * columns * BLOCK**2 > BUDGET:
        rows, columns = (math.floor(side / shrink / BLOCK) for side in (height, width))
    elif rows * columns * BLOCK**2 < BUDGET:
        rows, columns = (math.ceil(side / shrink / BLOCK) for side in (height, width))
    return rows * BLOCK, columns * BLOCK


def keys_cubic(t: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    t = t.abs()
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def resampling(out: int, into: int) -> Tensor:
    """The matrix (out, into) of a bicubic resize, whose kernel widens with the step so that nothing aliases."""
    step = into / out
    apart = (torch.arange(into) + 0.5)[None] - ((torch.arange(out) + 0.5) * step)[:, None]
    weights = keys_cubic(apart.double() / max(step, 1.0))
    return weights / weights.sum(1, keepdim=True)


def seen(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] -> as the network sees it."""
    height, width = sides(*image.shape[-2:])
    x = resampling(height, image.shape[-2]) @ image.double() @ resampling(width, image.shape[-1]).T
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std


def cut(x: Tensor) -> tuple[Tensor, Tensor]:
    """The patches (N, 1176), each shown for two frames, block by block of two by two; and their places (2, N)."""
    patches, places = [], []
    for top in range(0, x.shape[1], BLOCK):
        for left in range(0, x.shape[2], BLOCK):
            for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
                y, z = top + down * PATCH, left + right * PATCH
                patch = x[:, y : y + PATCH, z : z + PATCH]
                patches.append(torch.stack([patch, patch], dim=1).flatten())
                places.append((y // PATCH, z // PATCH))
    return torch.stack(patches), torch.tensor(places).T


# ------------------------------------------------------------------------------------------------ the networks


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """(N, heads, d), whose halves are pairs of coordinates, turned by (N, d / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q k / sqrt(d)) v of (N, heads, d), with fewer heads of k and v than of q; (N, heads d)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[2])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)


def frequencies(width: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


class HPSv3Forward:
    """mu of one picture and prompt from a file of published names and the base model's folder.

    plain: every token has its number as its position, as the authors' code has it; else Qwen2-VL's own positions of
    frame, row and column.
    """

    def __init__(self, weights: Path, base: Path, question: str, plain: bool = True):
        self.weights = {name: tensor.double() for name, tensor in load_file(weights).items()}
        self.about: Mapping[str, Any] = json.loads((base / "config.json").read_text())
        self.tokenizer, self.question, self.plain = AutoTokenizer.from_pretrained(base), question, plain

    def __call__(self, image: Tensor, prompt: str) -> Tensor:
        return self.score(self.hidden(image, prompt))[0]

    def score(self, x: Tensor) -> Tensor:
        """[mu, log sigma] of a hidden state."""
        x = self.linear(x, "rm_head.0").clamp(min=0)
        return self.linear(self.linear(x, "rm_head.3").clamp(min=0), "rm_head.5")

    def hidden(self, image: Tensor, prompt: str) -> Tensor:
        """(D,), at the reward token, read in the whole chat."""
        pixels = seen(image)
        picture = self.picture(*cut(pixels))
        ids = self.ids(chat(self.question.replace("{prompt}", prompt)), len(picture))
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        begin = ids.index(pad)
        x = torch.cat([x[:begin], picture, x[begin + len(picture) :]])
        rows, columns = (side // BLOCK for side in pixels.shape[1:])
        positions = torch.arange(len(ids)).expand(3, -1) if self.plain else grid(begin, rows, columns, len(ids))
        return self.read(x, positions)[ids.index(self.reward)]

    @property
    def reward(self) -> int:
        """The id of <|Reward|>: the matrix's last row."""
        return len(self.weights["model.embed_tokens.weight"]) - 1

    def ids(self, text: str, picture: int) -> list[int]:
        """Marks are looked up, and what stands between them is tokenized by itself."""
        found: list[int] = []
        for part in re.split(r"(<\|\w+\|>)", text):
            if part == "<|Reward|>":
                found.append(self.reward)
            elif re.fullmatch(r"<\|\w+\|>", part):
                times = picture if part == "<|image_pad|>" else 1
                found += [self.tokenizer.convert_tokens_to_ids(part)] * times
            else:
                found += self.tokenizer.encode(part, add_special_tokens=False)
        return found

    # -------------------------------------------------------------------------------------------- eyes

    def picture(self, patches: Tensor, places: Tensor) -> Tensor:
        """The tokens of a picture, one of four patches each."""
        about = self.about["vision_config"]
        heads, width = about["num_heads"], about["embed_dim"]
        spread = frequencies(width // heads // 2, 10000.0)
        angles = torch.cat([place[:, None] * spread for place in places.double()], dim=1)
        x = patches @ self.weights["visual.patch_embed.proj.weight"].flatten(1).T
        for i in range(about["depth"]):
            block = f"visual.blocks.{i}"
            q, k, v = self.linear(self.layer_norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=1)
            q, k, v = (t.unflatten(1, (heads, -1)) for t in (q, k, v))
            mixed = attended(rotated(q, angles), rotated(k, angles), v, causal=False)
            x = x + self.linear(mixed, f"{block}.attn.proj")
            wide = self.linear(self.layer_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            x = x + self.linear(wide * torch.sigmoid(1.702 * wide), f"{block}.mlp.fc2")
        fours = self.layer_norm(x, "visual.merger.ln_q").reshape(-1, 4 * width)
        return self.linear(F.gelu(self.linear(fours, "visual.merger.mlp.0")), "visual.merger.mlp.2")

    # -------------------------------------------------------------------------------------------- reader

    def read(self, x: Tensor, positions: Tensor) -> Tensor:
        """The last hidden states of embedded tokens (L, D) at positions (3, L)."""
        about = self.about["text_config"]
        width = about["hidden_size"] // about["num_attention_heads"]
        rope = about["rope_parameters"]
        axes = torch.arange(3).repeat_interleave(torch.tensor(rope["mrope_section"]))  # of each frequency
        angles = positions[axes].T.double() * frequencies(width, rope["rope_theta"])
        for i in range(about["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            y = self.rms_norm(x, f"{layer}.input_layernorm")
            q, k, v = (self.linear(y, f"{layer}.self_attn.{n}_proj").unflatten(1, (-1, width)) for n in "qkv")
            mixed = attended(rotated(q, angles), rotated(k, angles), v, causal=True)
            x = x + self.linear(mixed, f"{layer}.self_attn.o_proj")
            y = self.rms_norm(x, f"{layer}.post_attention_layernorm")
            gate = F.silu(self.linear(y, f"{layer}.mlp.gate_proj"))
            x = x + self.linear(gate * self.linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
        return self.rms_norm(x, "model.norm")

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(1, keepdim=True) + self.about["text_config"]["rms_norm_eps"]).sqrt()
        return x / scale * self.weights[f"{name}.weight"]


def grid(begin: int, rows: int, columns: int, length: int) -> Tensor:
    """Qwen2-VL's positions (3, L) of text, a picture of so many tokens, and text: in the picture frame, row and column
    count from where it begins, and the text behind goes on one after the largest."""
    before = torch.arange(begin).expand(3, -1)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    inside = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + begin
    behind = torch.arange(length - begin - rows * columns) + int(inside.max()) + 1
    return torch.cat([before, inside, behind.expand(3, -1)], dim=1)
