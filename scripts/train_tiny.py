"""Trains the embedded models on the world of shapes, on two CPU cores or a GPU.

    python scripts/train_tiny.py vae decoder unet weak turbo clip classifier export

Stages run in the order given and leave their state in `train/`, so a stage that was stopped goes on where it was, and
one that is finished is skipped. `export` writes float16 safetensors in diffusers' and open_clip's own formats to
`difftune/weights/`. Every random number comes from (SEED, stage, step).

    python scripts/train_tiny.py restore unet turbo export

`restore` marks the stages behind the shipped models as finished, with the shipped weights (rounded to float16), so that
later stages can be trained without the states of the earlier ones.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import DPMSolverMultistepScheduler
from open_clip import CLIP
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from difftune import models
from rewards.learned.clip import CLIPScore
from rewards.world import draw, grammar
from rewards.world.classifier import CLASSES, ShapeClassifier, load_classifier
from rewards.world.render import BACKGROUNDS, COLORS, RESOLUTION, SHAPES, Scene, render

SEED = 0
TRAIN = Path("train")
SCENES = 50_000
KINDS = dict(zip(grammar.CATEGORIES, (0.12, 0.16, 0.20, 0.12, 0.22, 0.18), strict=True))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILE = False


@dataclass
class Fit:
    """One training run: `loss(step)` is minimised over `modules`; their averaged weights are what is kept."""

    name: str
    modules: dict[str, nn.Module]
    loss: Callable[[int], Tensor]
    steps: int
    lr: float
    decay: float = 0.999  # of the averaged weights
    every: int = 250  # steps between saves

    def run(self) -> None:
        parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01)
        average = [p.detach().clone() for p in parameters]
        start, began, shown = self._resume(parameters, average, optimizer), time.time(), 0.0
        for step in range(start, self.steps):
            torch.manual_seed(zlib.crc32(f"{SEED} {self.name} {step}".encode()))
            for group in optimizer.param_groups:
                group["lr"] = self.lr * one_cycle(step / self.steps)
            loss = self.loss(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate = 1 - min(self.decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], rate)
            shown = 0.98 * shown + 0.02 * loss.item()
            if step % 50 == 0:
                mean = shown / (1 - 0.98 ** (step - start + 1))
                print(f"{self.name} {step} loss {mean:.5f} {time.time() - began:.0f} s", flush=True)
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                self._save(parameters, average, optimizer, step + 1)
        with torch.no_grad():
            for parameter, mean in zip(parameters, average, strict=True):
                parameter.copy_(mean)

    def _save(self, parameters, average, optimizer, step) -> None:
        states = [optimizer.state[p] for p in parameters]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        self.write(self.name, parameters, average, means, squares, step)

    @staticmethod
    def write(name, parameters, average, means, squares, step) -> None:
        """The state of a stage after `step` steps, in `train/`."""
        tensors = {"step": torch.tensor(step)}
        for letter, values in zip("pamv", (parameters, average, means, squares), strict=True):
            tensors |= {f"{letter}{i}": value for i, value in enumerate(values)}
        TRAIN.mkdir(exist_ok=True)
        partial = TRAIN / f"{name}.partial"
        save_file({k: v.detach().clone().contiguous().cpu() for k, v in tensors.items()}, partial)
        partial.rename(TRAIN / f"{name}.safetensors")

    def _resume(self, parameters, average, optimizer) -> int:
        file = TRAIN / f"{self.name}.safetensors"
        if not file.exists():
            return 0
        tensors = load_file(file, device=str(DEVICE))
        with torch.no_grad():
            for i, (parameter, mean) in enumerate(zip(parameters, average, strict=True)):
                parameter.copy_(tensors[f"p{i}"])
                mean.copy_(tensors[f"a{i}"])
                moments = {"exp_avg": tensors[f"m{i}"], "exp_avg_sq": tensors[f"v{i}"]}
                optimizer.state[parameter] = {"step": tensors["step"].float().cpu(), **moments}
        return int(tensors["step"])


def compiled(module: nn.Module) -> nn.Module:
    """The module, or with `--compile` torch.compile's version of it: a quarter faster after some minutes."""
    return torch.compile(module, dynamic=False) if COMPILE else module


def one_cycle(t: float, warm: float = 0.05) -> float:
    """Linear warm-up, then half a cosine down to a hundredth: t in [0, 1]."""
    if t < warm:
        return 0.04 + 0.96 * t / warm
    return 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (t - warm) / (1 - warm)))


@cache
def scenes(count: int = SCENES, stream: int = 0) -> tuple[Tensor, list, list]:
    """(images (N, 3, 64, 64) uint8, captions, scenes) of one random stream."""
    rng = np.random.default_rng([SEED, stream])
    pairs = [draw.draw(rng, list(KINDS), list(KINDS.values())) for _ in range(count)]
    images = np.stack([(255 * render(scene)).round().astype(np.uint8) for _, scene in pairs])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [c for c, _ in pairs], [s for _, s in pairs]


def pixels(images: Tensor) -> Tensor:
    """uint8 images to [-1, 1]."""
    return images.to(DEVICE).float() / 127.5 - 1


def make_vae() -> AutoencoderKL:
    torch.manual_seed(SEED)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    ).to(DEVICE)


def train_vae(steps: int = 2400) -> AutoencoderKL:
    """L1 + L2 + a little KL; bfloat16 for most of the way, float32 for the last stretch."""
    vae = make_vae()

    def loss(step: int) -> Tensor:
        images = scenes()[0]
        x = pixels(images[torch.randint(len(images), (32,))])
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=step < 0.85 * steps):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        gap = y.float() - x
        return gap.abs().mean() + gap.square().mean() + 1e-4 * posterior.kl().float().mean() / 256

    Fit("vae", {"vae": vae}, loss, steps, 1.5e-3).run()
    return vae.eval()


# ------------------------------------------------------------------------------------------------ tokens and latents

LENGTH = 16  # tokens of a caption
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges, the same in every process: the BPE trainer breaks ties by chance, so they are kept on disk, and
    `restore` puts those of the shipped tokenizer there."""
    file = TRAIN / "vocabulary.json"
    if not file.exists():
        keep_vocabulary(*learnt_vocabulary())
    vocab, merges = json.loads(file.read_text())
    return vocab, [(first, second) for first, second in merges]


def keep_vocabulary(vocab: dict[str, int], merges: list) -> None:
    TRAIN.mkdir(exist_ok=True)
    partial = TRAIN / "vocabulary.partial"
    partial.write_text(json.dumps([vocab, merges]))
    partial.rename(TRAIN / "vocabulary.json")


def learnt_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's layout: every byte, every byte that ends a word, the merges that make a token of each word, two marks."""
    letters = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    names = [chr(i) for i in (*letters, *range(256, 512 - len(letters)))]
    words = [*grammar.SIZES, *COLORS, *SHAPES, *(s + "s" for s in SHAPES), *grammar.COUNTS]
    words += [*" ".join(grammar.RELATIONS).split(), *BACKGROUNDS, "and", "an", "on", "background"]
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer = BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    names += [name + "</w>" for name in names] + list(dict.fromkeys(a + b for a, b in merges))
    return {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}, merges


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: every word of the grammar is one token, any text works."""
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=LENGTH)


def tokens(texts: list[str]) -> Tensor:
    """Token ids (N, 16)."""
    batch = make_tokenizer()(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return batch.input_ids.to(DEVICE)


def make_text_encoder() -> CLIPTextModel:
    tokenizer = make_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(DEVICE)


def make_unet(channels: tuple[int, ...] = (64, 128)) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(DEVICE)


@cache
def latents() -> tuple[Tensor, float]:
    """(latents (N, 4, 8, 8) of unit variance, scaling factor) of every training scene."""
    file = TRAIN / "latents.safetensors"
    if not file.exists():
        vae, images = train_vae(), scenes()[0]
        with torch.no_grad():
            z = torch.cat([vae.encode(pixels(part)).latent_dist.mean.cpu() for part in images.split(256)])
        save_file({"z": z.contiguous()}, file)
    z = load_file(file)["z"]
    return z / z.std(), 1 / z.std().item()


@cache
def caption_tokens() -> Tensor:
    """Token ids (N, 16) of every training caption."""
    return tokens([str(caption) for caption in scenes()[1]])


def finished_vae(steps: int = 800, batch: int = 32) -> AutoencoderKL:
    """The VAE with its decoder trained on, under slightly noisy latents; the encoder stays, and so do the latents."""
    vae = train_vae()
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(SCENES, (batch,))
        z = latents()[0][chosen].to(DEVICE)
        z = (z + 0.05 * torch.rand(batch, 1, 1, 1, device=DEVICE) * torch.randn_like(z)) / latents()[1]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=step < 0.6 * steps):
            y = vae.decode(z).sample
        gap = y.float() - pixels(scenes()[0][chosen])
        return gap.abs().mean() + gap.square().mean()

    Fit("decoder", {"decoder": vae}, loss, steps, 6e-4).run()
    return vae.eval()


# ------------------------------------------------------------------------------------------------ diffusion models


def alpha_bar() -> Tensor:
    return DDIMScheduler(**TABLE).alphas_cumprod.to(DEVICE)


@cache
def shares(**kinds: float) -> Tensor:
    """The probability (N,) of each training scene that gives every category its share."""
    of = [grammar.category(caption) for caption in scenes()[1]]
    return torch.tensor([kinds[kind] / of.count(kind) for kind in kinds])[[list(kinds).index(kind) for kind in of]]


def denoising_loss(unet: nn.Module, text: nn.Module, batch: int = 64, share: dict | None = None) -> Tensor:
    """eps-prediction, min-SNR-5 weights (https://arxiv.org/abs/2303.09556), a tenth of the captions empty.

    With `share`, of the categories, high noise weighs up to ten times as much: there the layout is decided.
    """
    chosen = torch.multinomial(shares(**share), batch) if share else torch.randint(len(caption_tokens()), (batch,))
    z, ids = latents()[0][chosen].to(DEVICE), caption_tokens()[chosen]
    ids = torch.where(torch.rand(batch, 1, device=DEVICE) < 0.1, tokens([""]), ids)
    t = torch.randint(0, 1000, (batch,), device=DEVICE)
    power = alpha_bar()[t].view(-1, 1, 1, 1)
    eps = torch.randn_like(z)
    out = unet(power.sqrt() * z + (1 - power).sqrt() * eps, t, text(ids).last_hidden_state).sample
    snr = power / (1 - power)
    weight = snr.clamp(max=5) / snr * ((1 + 1 / snr).clamp(max=10) if share else 1)
    return (weight * (out - eps).square()).mean()


LAYOUT = dict(zip(grammar.CATEGORIES, (0.18, 0.14, 0.13, 0.05, 0.42, 0.08), strict=True))


def train_unet(steps: int = 5500, more: int = 1200) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """`tiny`: the text encoder is trained with the UNet. Relations come last, in stages of their own."""
    torch.manual_seed(SEED)
    unet, text = make_unet(), make_text_encoder()
    Fit("unet", {"unet": unet, "text": text}, lambda step: denoising_loss(unet, text), steps, 1.5e-3).run()
    layout = lambda step: denoising_loss(unet, text, share=LAYOUT)  # noqa: E731
    Fit("layout", {"unet": unet, "text": text}, layout, more, 8e-4).run()
    train_relations(unet, text)
    train_choices(unet, text)
    return unet.eval(), text.eval()


RELATED = (None, *grammar.RELATIONS)
PARTS = {  # what a caption says, as classes; None: nothing
    "relation": RELATED,
    "first color": (None, *COLORS),
    "first shape": tuple(SHAPES),
    "second color": (None, *COLORS),
    "second shape": (None, *SHAPES),
    "count": (1, 2, 3),
}


class Reader(nn.Module):
    """Reads what a caption says from the text encoder's last states, at its last noun and after.

    The denoising loss alone let the embeddings of "left" and "right" fall together, where its gradient vanishes: the
    distance between the two captions was 2 % of the states' norm. The reader sees the states under noise as large as
    they are, and so keeps them apart.
    """

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(128, sum(map(len, PARTS.values())))
        nouns = [*SHAPES, *(f"{shape}s" for shape in SHAPES)]
        self.nouns = tokens(nouns)[:, 1]

    def forward(self, states: Tensor, ids: Tensor, said: Tensor) -> Tensor:
        """Cross-entropy of states (B, 16, 128) of token ids (B, 16), `said` (B, 6) being the classes."""
        place = torch.arange(LENGTH, device=ids.device)
        read = place >= (torch.isin(ids, self.nouns) * place).amax(1, keepdim=True)
        noisy = states + states.detach().std() * torch.randn_like(states)
        guesses = self.head(noisy)[read].split([len(classes) for classes in PARTS.values()], dim=-1)
        truths = said[:, None].expand(-1, LENGTH, -1)[read]
        losses = [cross_entropy(guess, truths[:, i]) for i, guess in enumerate(guesses)]
        return torch.stack(losses).mean()


def said(caption: grammar.Caption, relation: str | None = None) -> list[int]:
    """The classes of a caption, in the order of `PARTS`."""
    first, *rest = caption.phrases
    second = rest[0] if rest else grammar.Phrase("")
    values = (relation or caption.relation, first.color, first.shape, second.color, second.shape or None, len(rest) + 1)
    return [classes.index(value) for classes, value in zip(PARTS.values(), values, strict=True)]


class Lessons(NamedTuple):
    """Captions of training scenes."""

    scene: Tensor  # (N,), which
    ids: Tensor  # (N, 16)
    said: Tensor  # (N, 6)

    def draw(self, count: int) -> "Lessons":
        return self.of(torch.randint(len(self.scene), (count,)))

    def of(self, index: Tensor) -> "Lessons":
        return Lessons(*(value[index.to(value.device)] for value in self))


@cache
def lessons() -> tuple[Lessons, Lessons, Lessons]:
    """Of all captions; of those with a relation; and of one object, with the side of the picture that it is on said as
    half a relation ("a red circle left of"), which is what is learnt first."""
    _, captions, worlds = scenes()
    whole = Lessons(torch.arange(SCENES), caption_tokens(), torch.tensor([said(c) for c in captions], device=DEVICE))
    related = torch.tensor([i for i, caption in enumerate(captions) if caption.relation])
    sides = [(i, side(scene)) for i, scene in enumerate(worlds) if len(scene.things) == 1 and side(scene)]
    texts = [str(replace(captions[i], background=None)) + f" {where}" for i, where in sides]
    classes = torch.tensor([said(captions[i], where) for i, where in sides], device=DEVICE)
    halves = Lessons(torch.tensor([i for i, _ in sides]), tokens(texts), classes)
    return whole, whole.of(related), halves


def side(scene: Scene) -> str | None:
    """Where the only object is from the middle, if that is plain to see."""
    thing, middle = scene.things[0], RESOLUTION / 2
    dx, dy = abs(thing.x - middle), abs(thing.y - middle)
    if max(dx, dy) < max(4, 1.33 * min(dx, dy)):
        return None
    return grammar.relation(thing, replace(thing, x=middle, y=middle))


OPEN = dict(zip(grammar.CATEGORIES, (0.34, 0.24, 0.10, 0.06, 0.16, 0.10), strict=True))


def train_relations(
    unet: nn.Module, text: nn.Module, words: int = 500, places: int = 900, polish: int = 1200, open: int = 700
) -> None:
    """First the text encoder learns what captions say, then the UNet where things are, then both everything, and at
    last, with weight on captions that leave colours open, to decide for one instead of blending."""
    reader, network = Reader().to(DEVICE), compiled(unet)
    modules = {"unet": unet, "text": text, "reader": reader}

    def reading(step: int) -> Tensor:
        batch = joined(part.draw(count) for part, count in zip(lessons(), (40, 48, 40), strict=True))
        return reader(text(batch.ids).last_hidden_state, batch.ids, batch.said)

    def placing(step: int) -> Tensor:
        batch = joined(part.draw(count) for part, count in zip(lessons(), (20, 22, 22), strict=True))
        return denoising_and_reading(batch, high=0.75, cap=40)

    def polishing(step: int) -> Tensor:
        batch = joined(part.draw(count) for part, count in zip(lessons()[:2], (44, 20), strict=True))
        return denoising_and_reading(batch, high=0.3, cap=10)

    def opening(step: int) -> Tensor:
        return denoising_and_reading(lessons()[0].of(torch.multinomial(shares(**OPEN), 64)), high=0.4, cap=20)

    def denoising_and_reading(batch: Lessons, high: float, cap: float) -> Tensor:
        states = text(batch.ids).last_hidden_state
        late = torch.rand(len(states)) < high
        t = torch.where(late, torch.randint(600, 1000, late.shape), torch.randint(0, 1000, late.shape)).to(DEVICE)
        empty = torch.rand(len(states), 1, 1, device=DEVICE) < 0.1
        seen = torch.where(empty, text(tokens([""])).last_hidden_state, states)
        return x0_loss(network, latents()[0][batch.scene].to(DEVICE), t, seen, cap) + 0.1 * reader(states, *batch[1:])

    Fit("words", {"text": text, "reader": reader}, reading, words, 1e-3).run()
    Fit("places", modules, placing, places, 1e-3).run()
    Fit("polish", modules, polishing, polish, 8e-4).run()
    Fit("open", modules, opening, open, 8e-4).run()


def train_choices(unet: nn.Module, text: nn.Module, steps: int = 2600) -> None:
    """What takes the UNet longest: to choose one colour or place where the caption leaves it open. The text encoder
    stays, so that `tiny-weak` may be trained before."""
    text.requires_grad_(False)
    network, empty = compiled(unet), tokens([""])

    def loss(step: int) -> Tensor:
        chosen = lessons()[0].of(torch.multinomial(shares(**OPEN), 64))
        t = torch.where(torch.rand(64) < 0.4, torch.randint(500, 1000, (64,)), torch.randint(0, 1000, (64,)))
        ids = torch.where(torch.rand(64, 1, device=DEVICE) < 0.1, empty, chosen.ids)
        states = text(ids).last_hidden_state
        return x0_loss(network, latents()[0][chosen.scene].to(DEVICE), t.to(DEVICE), states, cap=20)

    Fit("choices", {"unet": unet}, loss, steps, 1e-3).run()


def joined(parts: Iterable[Lessons]) -> Lessons:
    return Lessons(*(torch.cat(values) for values in zip(*parts, strict=True)))


def x0_loss(unet: nn.Module, z: Tensor, t: Tensor, states: Tensor, cap: float) -> Tensor:
    """The error of eps, weighted by min-SNR-5, or of x0 where that is more (up to `cap`): layout is made there."""
    power = alpha_bar()[t].view(-1, 1, 1, 1)
    eps, snr = torch.randn_like(z), power / (1 - power)
    out = unet(power.sqrt() * z + (1 - power).sqrt() * eps, t, states).sample
    weight = snr.clamp(max=5) / snr * (1 / snr).clamp(1, cap)
    return (weight * (out - eps).square()).mean()


def train_weak(steps: int = 600) -> UNet2DConditionModel:
    """`tiny-weak`: a fraction of the channels, stopped early, under `tiny`'s text encoder."""
    text = train_unet()[1].requires_grad_(False)
    torch.manual_seed(SEED + 1)
    unet = make_unet((32, 32))
    Fit("weak", {"unet": unet}, lambda step: denoising_loss(unet, text), steps, 1.5e-3).run()
    return unet.eval()


def pipeline() -> StableDiffusionPipeline:
    """`tiny` as a whole."""
    unet, text = train_unet()
    vae = finished_vae()
    vae.register_to_config(scaling_factor=latents()[1])
    scheduler = DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae, text, make_tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------ tiny-turbo

SOLVER_STEPS = 8
GUIDANCE = 3.0
TRAJECTORIES = 6_000


def trajectories(count: int = TRAJECTORIES, batch: int = 125) -> Iterator[dict[str, Tensor]]:
    """The teacher's guided trajectories, parts on disk: x (B, 9, 4, 8, 8) from noise to data, t (8,), ids (B, 16)."""
    folder = TRAIN / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = None
    for part in range(count // batch):
        file = folder / f"{part}.safetensors"
        if not file.exists():
            pipe = pipe or pipeline()
            partial = file.with_suffix(".partial")
            save_file(teach(pipe, part, batch), partial)
            partial.rename(file)
            if part % 10 == 0:
                print(f"trajectories {part * batch} of {count}", flush=True)
        yield load_file(file)


@torch.no_grad()
def teach(pipe: StableDiffusionPipeline, part: int, batch: int) -> dict[str, Tensor]:
    """One part: DPM++ 2M under classifier-free guidance, for captions of a stream of their own."""
    scheduler = DPMSolverMultistepScheduler(**TABLE, timestep_spacing="trailing", final_sigmas_type="zero")
    scheduler.set_timesteps(SOLVER_STEPS)
    rng = np.random.default_rng([SEED, 7, part])
    ids = tokens([str(draw_caption(rng)) for _ in range(batch)])
    cond, uncond = pipe.text_encoder(ids)[0], pipe.text_encoder(tokens([""]))[0].expand(batch, -1, -1)
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1000 + part)).to(DEVICE)
    xs = [x]
    for t in scheduler.timesteps:
        u, c = pipe.unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample.chunk(2)
        x = scheduler.step(u + GUIDANCE * (c - u), t, x).prev_sample
        xs.append(x)
    return {"x": torch.stack(xs, 1).cpu().contiguous(), "t": scheduler.timesteps.clone(), "ids": ids.cpu()}


def draw_caption(rng: np.random.Generator) -> grammar.Caption:
    while True:
        caption = draw.draw_caption(rng, str(rng.choice(list(KINDS), p=list(KINDS.values()))))
        if grammar.content(caption) not in draw.held_out():
            return caption


def train_turbo(steps: int = 2000, batch: int = 64) -> UNet2DConditionModel:
    """`tiny-turbo`: maps any point of the teacher's trajectory to its end, half of the time from pure noise.

    Supervised consistency distillation (https://arxiv.org/abs/2310.04378, with the solver's own end point as the
    target): x0 = (x - sigma * eps) / alpha is regressed with a pseudo-Huber loss.
    """
    teacher, text = train_unet()
    text.requires_grad_(False)
    student = make_unet()
    student.load_state_dict(teacher.state_dict())
    network = compiled(student)
    parts = list(trajectories())
    x, ids, times = torch.cat([p["x"] for p in parts]), torch.cat([p["ids"] for p in parts]), parts[0]["t"]

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(x), (batch,))
        at = torch.where(torch.rand(batch) < 0.5, 0, torch.randint(0, SOLVER_STEPS, (batch,)))
        start, end, t = x[chosen, at].to(DEVICE), x[chosen, -1].to(DEVICE), times[at].to(DEVICE)
        power = alpha_bar()[t].view(-1, 1, 1, 1)
        eps = network(start, t, text(ids[chosen].to(DEVICE)).last_hidden_state).sample
        x0 = (start - (1 - power).sqrt() * eps) / power.sqrt()
        return ((x0 - end).square().flatten(1).sum(1) + 0.01).sqrt().mean()

    Fit("turbo", {"unet": student}, loss, steps, 8e-4).run()
    return student.eval()


# ------------------------------------------------------------------------------------------------ rewards

CLIP_CONFIG = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 64, "layers": 5, "width": 96, "patch_size": 8, "head_width": 32},
    "text_cfg": {
        "context_length": LENGTH,
        "width": 96,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "tiny-clip",
        "pool_type": "eos",
    },
}
EDITS = 7


def make_clip() -> CLIP:
    tokenizer = make_tokenizer()
    CLIP_CONFIG["text_cfg"] |= {"vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id}
    return CLIP(**CLIP_CONFIG).to(DEVICE)


@cache
def decoded() -> Tensor:
    """Every fourth training picture after a VAE round trip, uint8."""
    vae, images = finished_vae(), scenes()[0][::4]
    with torch.no_grad():
        parts = [vae.decode(vae.encode(pixels(part)).latent_dist.mean).sample for part in images.split(256)]
    return torch.cat([((part.clamp(-1, 1) + 1) * 127.5).round().byte().cpu() for part in parts])


def train_clip(
    steps: int = 2000, more: int = 1400, last: int = 1000, sides: int = 1500, orders: int = 1300, polish: int = 500
) -> CLIP:
    """`tiny-clip`: each picture against its caption, seven minimal edits of it, and the batch's other false captions.

    Half of the pictures have been through the VAE, half of them carry Gaussian noise. The later stretches have more
    edits of relations, counts and sizes, which are learnt last: relations only where they are most of the pictures,
    and what was forgotten for them at the end.
    """
    torch.manual_seed(SEED + 2)
    model, phase, batch = make_clip(), {"late": 0}, 64

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([SEED, 3 + phase["late"], step])
        images, captions, worlds = scenes()
        chosen = 4 * rng.integers(len(images) // 4, size=batch)
        pictures = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images[chosen], decoded()[chosen // 4])
        x = pixels(pictures)
        x = x + 0.2 * (torch.rand(batch, 1, 1, 1, device=DEVICE) - 0.5).clamp(min=0) * torch.randn_like(x)
        mine, there = [captions[i] for i in chosen], [worlds[i] for i in chosen]
        late = step % 2 == 1 and phase["late"] > 0
        wrong = [negatives(rng, caption, scene, late) for caption, scene in zip(mine, there, strict=True)]
        texts = [str(caption) for caption in mine] + [text for several in wrong for text in several]
        image, text = model.encode_image(x, normalize=True), model.encode_text(tokens(texts), normalize=True)
        scale, true = model.logit_scale.exp(), torch.arange(batch, device=DEVICE)
        also = torch.tensor([[grammar.holds(c, s) for c in mine] for s in there], device=DEVICE)
        also.fill_diagonal_(False)
        others = (scale * image @ text[:batch].T).masked_fill(also, -torch.inf)
        own = scale * torch.einsum("bd,bkd->bk", image, text[batch:].view(batch, EDITS, -1))
        return cross_entropy(torch.cat([others, own], 1), true) + 0.5 * cross_entropy(others.T, true)

    Fit("clip", {"clip": model}, loss, steps, 1e-3).run()
    phase["late"] = 1
    Fit("clip_late", {"clip": model}, loss, more, 8e-4).run()
    phase["late"] = 6  # its random numbers are of a stream of their own
    Fit("clip_last", {"clip": model}, loss, last, 8e-4).run()
    phase["late"] = 7
    sided = lambda step: placing_loss(model, step, 20, 40, 24) if step % 3 else loss(step)  # noqa: E731
    Fit("clip_sides", {"clip": model}, sided, sides, 1e-3).run()
    phase["late"] = 8
    ordered = lambda step: placing_loss(model, step, 21, 56, 8) if step % 4 else loss(step)  # noqa: E731
    Fit("clip_orders", {"clip": model}, ordered, orders, 1e-3).run()
    phase["late"] = 9
    polished = lambda step: loss(step) if step % 3 else placing_loss(model, step, 22, 56, 8)  # noqa: E731
    Fit("clip_polish", {"clip": model}, polished, polish, 6e-4).run()
    return model.eval()


def placing_loss(model: CLIP, step: int, stream: int, related: int, single: int) -> Tensor:
    """Pictures with a relation against their edits, and single objects against the four sides that they may be on
    ("a red circle left of"), which is what is learnt first."""
    rng, (images, captions, worlds) = np.random.default_rng([SEED, stream, step]), scenes()
    pairs, ones = (rng.choice(part.scene.numpy(), n) for part, n in zip(lessons()[1:], (related, single), strict=True))
    texts = [[str(captions[i]), *negatives(rng, captions[i], worlds[i], late=True)] for i in pairs]
    for i in ones:
        what, where = replace(captions[i], background=None), side(worlds[i])
        texts.append([f"{what} {word}" for word in sorted(grammar.RELATIONS, key=lambda word: word != where)])
    chosen = np.concatenate([pairs, ones])
    x = pixels(images[chosen])
    x = x + 0.2 * (torch.rand(len(x), 1, 1, 1, device=DEVICE) - 0.5).clamp(min=0) * torch.randn_like(x)
    image = model.encode_image(x, normalize=True)
    text = model.encode_text(tokens([text for several in texts for text in several]), normalize=True)
    losses = []
    for own, its in zip(image.split([related, single]), text.split([related * (EDITS + 1), single * 4]), strict=True):
        score = model.logit_scale.exp() * torch.einsum("bd,bkd->bk", own, its.view(len(own), -1, its.shape[-1]))
        losses.append(cross_entropy(score, torch.zeros(len(own), dtype=torch.long, device=DEVICE)))
    return sum(losses)


def negatives(rng: np.random.Generator, caption: grammar.Caption, scene: Scene, late: bool) -> list[str]:
    """EDITS false captions: the swaps, then one-word changes, repeated where there are too few.

    `late`: changes of relation, count and size come first.
    """
    swapped, changed = grammar.swaps(caption, scene), grammar.edits(caption, scene)
    order = [changed[i] for i in rng.permutation(len(changed))]
    if late:
        names = {(phrase.shape, phrase.color) for phrase in caption.phrases}
        order.sort(key=lambda text: {(phrase.shape, phrase.color) for phrase in grammar.parse(text).phrases} != names)
    texts = (swapped + order)[:EDITS]
    return (texts * EDITS)[:EDITS]


def train_classifier(steps: int = 1500, batch: int = 64) -> ShapeClassifier:
    """`tiny-classifier`: one object, drawn or through the VAE, with up to 0.1 of Gaussian noise."""
    torch.manual_seed(SEED + 3)
    model = ShapeClassifier().to(DEVICE)
    single = [i for i, world in enumerate(scenes()[2]) if len(world.things) == 1 and i % 4 == 0]
    labels = [CLASSES.index(f"{w.things[0].color} {w.things[0].shape}") for w in (scenes()[2][i] for i in single)]

    def loss(step: int) -> Tensor:
        pick = torch.randint(len(single), (batch,))
        index = torch.tensor(single)[pick]
        pictures = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, scenes()[0][index], decoded()[index // 4])
        x = (pixels(pictures) + 1) / 2
        x = x + 0.1 * torch.rand(batch, 1, 1, 1, device=DEVICE) * torch.randn_like(x)
        return cross_entropy(model(x), torch.tensor(labels)[pick].to(DEVICE))

    Fit("classifier", {"classifier": model}, loss, steps, 2e-3).run()
    return model.eval()


# ------------------------------------------------------------------------------------------------ restore and export


def restore() -> None:
    """States of finished stages made of the shipped weights; a stage that has a state keeps it."""
    pipe = StableDiffusionPipeline.from_pretrained(models.path("tiny"))
    if not (TRAIN / "vocabulary.json").exists():
        learnt = json.loads((models.path("tiny") / "tokenizer/tokenizer.json").read_text())["model"]
        keep_vocabulary(learnt["vocab"], learnt["merges"])
    denoiser = [pipe.unet, pipe.text_encoder]
    clip, classifier = CLIPScore(models.path("tiny-clip")).model, load_classifier(models.path("tiny-classifier"))
    names = ("tiny-weak", "tiny-turbo")
    weak, turbo = (UNet2DConditionModel.from_pretrained(models.path(name), subfolder="unet") for name in names)
    related = [*denoiser, Reader()]  # the reader is not shipped, and not needed once its stages are over
    shipped = {
        "vae": ([pipe.vae], 2400),
        "decoder": ([pipe.vae.decoder, pipe.vae.post_quant_conv], 800),
        "unet": (denoiser, 5500),
        "layout": (denoiser, 1200),
        "words": ([pipe.text_encoder, related[-1]], 500),
        "places": (related, 900),
        "polish": (related, 1200),
        "open": (related, 700),
        "choices": ([pipe.unet], 2600),
        "weak": ([weak], 600),
        "turbo": ([turbo], 2000),
        "clip": ([clip], 2000),
        "clip_late": ([clip], 1400),
        "clip_last": ([clip], 1000),
        "clip_sides": ([clip], 1500),
        "clip_orders": ([clip], 1300),
        "clip_polish": ([clip], 500),
        "classifier": ([classifier], 1500),
    }
    for name, (modules, steps) in shipped.items():
        if not (TRAIN / f"{name}.safetensors").exists():
            parameters = [p for module in modules for p in module.parameters()]
            zeros = [torch.zeros_like(p) for p in parameters]
            Fit.write(name, parameters, parameters, zeros, zeros, steps)


def export() -> None:
    """Everything in float16, in the formats of diffusers and open_clip."""
    export_rewards(Path("rewards/weights"))
    export_pipelines(Path("difftune/weights"))


def export_pipelines(weights: Path) -> None:
    pipeline().to(torch.float16).save_pretrained(weights / "tiny")
    encoder = weights / "tiny/text_encoder/config.json"  # transformers loads in the dtype named here
    encoder.write_text(json.dumps(json.loads(encoder.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    train_weak().half().save_pretrained(weights / "tiny-weak/unet")
    train_turbo().half().save_pretrained(weights / "tiny-turbo/unet")
    scheduler = LCMScheduler(**TABLE, clip_sample=False, original_inference_steps=50, steps_offset=1)
    scheduler.save_pretrained(weights / "tiny-turbo/scheduler")


def export_rewards(weights: Path) -> None:
    half = [0.5, 0.5, 0.5]
    preprocess = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}
    folder = weights / "tiny-clip"
    store(train_clip(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    make_tokenizer().save_pretrained(folder)
    classifier = train_classifier()
    store(classifier, weights / "tiny-classifier/model.safetensors")
    (weights / "tiny-classifier/config.json").write_text(json.dumps(classifier.config, indent=2) + "\n")


def store(model: nn.Module, file: Path) -> None:
    """The weights in float16."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}, file)


STAGES = {
    "restore": restore,
    "vae": train_vae,
    "latents": latents,
    "decoder": finished_vae,
    "unet": train_unet,
    "weak": train_weak,
    "turbo": train_turbo,
    "clip": train_clip,
    "classifier": train_classifier,
    "export": export,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--compile", action="store_true", help="compile the UNet, where a C++ compiler is at hand")
    options = parser.parse_args()
    COMPILE = options.compile
    for stage in options.stages:
        STAGES[stage]()
