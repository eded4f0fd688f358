"""Rewards by name: what a user must know of each, and how to load it.

Listing imports nothing heavy: an entry names its class as "module:Class", and `load` imports it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

from rewards.errors import NotFetched, RewardError

if TYPE_CHECKING:
    from torch import Tensor

Make = TypeVar("Make", bound="Callable[..., Reward]")
GROUP = "difftune.rewards"  # of entry points
OF_ALL = ("batch_size", "gradient_checkpointing")  # options that `load` adds to those of the reward


class Reward(Protocol):
    """Scores images. `differentiable` says whether a gradient reaches the pixels."""

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1] and B prompts -> scores (B,) float32; a gradient only if differentiable."""


@dataclass(frozen=True)
class Entry:
    """What a user must know of a reward before using it."""

    make: str | Callable[..., Reward]  # "module:Class", imported by `load`, or the class itself
    summary: str  # one line
    needs_prompt: bool
    differentiable: bool
    range: tuple[float, float]  # nominal: what to expect, not a bound
    higher_is_better: bool = True
    comparable_across_prompts: bool = True  # False: scores of one prompt rank, those of two do not
    resolution: int | None = None  # side in pixels of what it looks at; None: as it comes
    preprocessing: str = "none"
    text_max_len: int | None = None  # in tokens; what is longer is cut
    licence: str = "Apache-2.0"  # of the weights, or of the code if there are none
    noncommercial: bool = False
    copyleft: bool = False  # AGPL and the like
    weights: tuple[str, ...] = ()  # what it downloads, by its names in lock.json; empty: computed, embedded or your own
    memory_mb: int = 0  # of its weights, in float32
    fetch: str | None = None  # "module:function": downloads what its options name, in place of `weights`
    wraps: bool = False  # it is made of another reward, its option `reward`, whose facts it has
    extra: str | None = None  # the extra of this distribution that it needs


ORACLE = "rounded to 8 bits, antialiased bilinear resize"
CLIP = "antialiased bicubic resize of the shorter side, centre crop, CLIP's mean and std"
PAD = "antialiased bicubic resize of the longer side, black padding, CLIP's mean and std"

REWARDS: dict[str, Entry] = {
    "oracle": Entry(
        "rewards.world.oracle:Oracle",
        "1 if the caption holds of the shapes in the picture, else 0: exact, for evaluation",
        needs_prompt=True,
        differentiable=False,
        range=(0, 1),
        resolution=64,
        preprocessing=ORACLE,
    ),
    "tiny-clip": Entry(
        "rewards.learned.clip:tiny_clip",
        "cosine between picture and caption, by the embedded CLIP of the world of shapes",
        needs_prompt=True,
        differentiable=True,
        range=(-1, 1),
        resolution=64,
        preprocessing="antialiased bicubic resize of the shorter side, centre crop, the model's mean and std",
        memory_mb=10,
    ),
    "jpeg": Entry(
        "rewards.jpeg:JPEG",
        "size in kB (1000 bytes) of the picture as JPEG; a negative weight asks for compressible pictures",
        needs_prompt=False,
        differentiable=False,
        range=(0.5, 300),
        preprocessing="rounded to 8 bits",
    ),
    "brightness": Entry(
        "rewards.simple:Brightness",
        "distance of the mean pixel from a target, negated",
        needs_prompt=False,
        differentiable=True,
        range=(-1, 0),
    ),
    "colorfulness": Entry(
        "rewards.simple:Colorfulness",
        "how colourful a picture looks, by Hasler and Suesstrunk (2003): 0 gray, 33 moderately, 109 extremely",
        needs_prompt=False,
        differentiable=True,
        range=(0, 150),
    ),
    "jpeg-proxy": Entry(
        "rewards.jpeg:JPEGProxy",
        "estimate of the size in kB as JPEG, with a gradient; a negative weight asks for compressible pictures",
        needs_prompt=False,
        differentiable=True,
        range=(0.5, 300),
    ),
    "symmetry": Entry(
        "rewards.simple:Symmetry",
        "mean difference of the picture and its mirror image, negated",
        needs_prompt=False,
        differentiable=True,
        range=(-1, 0),
    ),
    "object-count": Entry(
        "rewards.world.oracle:ObjectCount",
        "how far the number of shapes is from the caption's, negated: exact, for evaluation",
        needs_prompt=True,
        differentiable=False,
        range=(-60, 0),
        resolution=64,
        preprocessing=ORACLE,
    ),
    "position": Entry(
        "rewards.world.oracle:Position",
        "1 if two shapes stand as the caption says, else 0: exact, for evaluation",
        needs_prompt=True,
        differentiable=False,
        range=(0, 1),
        resolution=64,
        preprocessing=ORACLE,
    ),
    "coverage": Entry(
        "rewards.world.oracle:Coverage",
        "share of pixels that background and readable shapes explain; noise and running colours have less",
        needs_prompt=False,
        differentiable=False,
        range=(0, 1),
        resolution=64,
        preprocessing=ORACLE,
    ),
    "ocr": Entry(
        "rewards.learned.ocr:OCR",
        "how much of the text that the prompt quotes can be read in the picture",
        needs_prompt=True,
        differentiable=False,
        range=(0, 1),
        preprocessing="rounded to 8 bits",
        extra="ocr",
    ),
    "tiny-classifier": Entry(
        "rewards.learned.classify:TinyClassifier",
        "log-probability of the caption's colour and shape, by the embedded classifier of one object",
        needs_prompt=True,
        differentiable=True,
        range=(-30, 0),
        resolution=64,
        preprocessing="antialiased bicubic resize",
        memory_mb=1,
    ),
    "classifier": Entry(
        "rewards.learned.classify:classifier",
        "log-probability of a class, by any image classifier of timm or transformers",
        needs_prompt=True,
        differentiable=True,
        range=(-30, 0),
        preprocessing="the model's own, in torch",
        licence="the model's",
        fetch="rewards.hub:fetch_model",
    ),
    "clip-score": Entry(
        "rewards.learned.clip:clip_score",
        "cosine between picture and prompt, by CLIP ViT-L/14 or any CLIP of transformers",
        needs_prompt=True,
        differentiable=True,
        range=(0, 0.4),
        resolution=224,
        preprocessing=CLIP,
        text_max_len=77,
        licence="MIT",
        weights=("clip-vit-l-14",),
        fetch="rewards.learned.clip:fetch_clip_score",
        memory_mb=1711,
    ),
    "open-clip": Entry(
        "rewards.learned.clip:open_clip_score",
        "cosine between picture and prompt, by any model of open_clip with its pretrained tag",
        needs_prompt=True,
        differentiable=True,
        range=(0, 0.4),
        preprocessing="the model's own, in torch",
        text_max_len=77,
        licence="the model's",
        fetch="rewards.learned.clip:fetch_open_clip",
        memory_mb=605,
    ),
    "clip": Entry(
        "rewards.learned.clip:clip_logit",
        "CLIP's logit, about 100 cosine, by ViT-H/14 of LAION-2B: ReNO's",
        needs_prompt=True,
        differentiable=True,
        range=(0, 45),
        resolution=224,
        preprocessing="the model's own, in torch",
        text_max_len=77,
        licence="MIT",
        fetch="rewards.learned.clip:fetch_open_clip",
        memory_mb=3940,
    ),
    "pickscore": Entry(
        "rewards.learned.clip:pickscore",
        "PickScore v1: what people prefer of two pictures of a prompt (ViT-H/14)",
        needs_prompt=True,
        differentiable=True,
        range=(15, 26),
        resolution=224,
        preprocessing=CLIP,
        text_max_len=77,
        licence="MIT (of the code; the weights' is not stated here)",
        weights=("pickscore-v1",),
        memory_mb=3940,
    ),
    "hps-v2": Entry(
        "rewards.learned.clip:hps_v2",
        "Human Preference Score v2 (ViT-H/14)",
        needs_prompt=True,
        differentiable=True,
        range=(0.15, 0.4),
        comparable_across_prompts=False,
        resolution=224,
        preprocessing=PAD,
        text_max_len=77,
        weights=("hps-v2",),
        memory_mb=3940,
    ),
    "hps-v2.1": Entry(
        "rewards.learned.clip:hps",
        "Human Preference Score v2.1 (ViT-H/14)",
        needs_prompt=True,
        differentiable=True,
        range=(0.15, 0.4),
        comparable_across_prompts=False,
        resolution=224,
        preprocessing=PAD,
        text_max_len=77,
        weights=("hps-v2.1",),
        memory_mb=3940,
    ),
    "hps-v3": Entry(
        "rewards.learned.hpsv3:HPSv3",
        "Human Preference Score v3 (Qwen2-VL 7B): what people prefer, of any picture and prompt",
        needs_prompt=True,
        differentiable=True,
        range=(-5, 15),
        preprocessing="antialiased bicubic resize to multiples of 28 with about 200,704 pixels, CLIP's mean and std",
        fetch="rewards.learned.hpsv3:fetch_hpsv3",
        memory_mb=33200,
    ),
    "imagereward": Entry(
        "rewards.learned.imagereward:ImageReward",
        "ImageReward v1: what people prefer, by BLIP reading the prompt over the picture",
        needs_prompt=True,
        differentiable=True,
        range=(-2.3, 2),
        resolution=224,
        preprocessing=CLIP,
        text_max_len=35,
        weights=("imagereward-v1", "bert-vocabulary"),
        memory_mb=1790,
    ),
    "cyclereward": Entry(
        "rewards.learned.imagereward:CycleReward",
        "CycleReward: how well picture and prompt can be made of each other, by ImageReward's BLIP",
        needs_prompt=True,
        differentiable=True,
        range=(-5, 5),
        resolution=224,
        preprocessing=CLIP,
        text_max_len=128,
        licence="MIT data, weights as their cards say",
        fetch="rewards.learned.imagereward:fetch_cycle_reward",
        memory_mb=1790,
    ),
    "aesthetic": Entry(
        "rewards.learned.aesthetic:Aesthetic",
        "LAION's aesthetic predictor v2, sac+logos+ava1 (CLIP ViT-L/14)",
        needs_prompt=False,
        differentiable=True,
        range=(1, 10),
        resolution=224,
        preprocessing=CLIP,
        weights=("clip-vit-l-14",),
        memory_mb=1220,
    ),
    "aesthetic-ava": Entry(
        "rewards.learned.aesthetic:aesthetic_ava",
        "LAION's aesthetic predictor v2, ava+logos (CLIP ViT-L/14)",
        needs_prompt=False,
        differentiable=True,
        range=(1, 10),
        resolution=224,
        preprocessing=CLIP,
        weights=("clip-vit-l-14",),
        memory_mb=1220,
    ),
    "aesthetic-v1": Entry(
        "rewards.learned.aesthetic:aesthetic_v1",
        "LAION's first aesthetic predictor, which LAION-Aesthetics is cut by (CLIP ViT-L/14)",
        needs_prompt=False,
        differentiable=True,
        range=(1, 10),
        resolution=224,
        preprocessing=CLIP,
        licence="MIT",
        weights=("clip-vit-l-14",),
        memory_mb=1220,
    ),
    "lpips": Entry(
        "rewards.learned.lpips:LPIPS",
        "minus LPIPS: how near the picture is to a reference as people see it (AlexNet)",
        needs_prompt=False,
        differentiable=True,
        range=(-1, 0),
        preprocessing="the reference resized to the picture's size, AlexNet's mean and std",
        licence="BSD-2-Clause; AlexNet as torchvision has it",
        weights=("alexnet",),
        fetch="rewards.learned.lpips:fetch_lpips",
        memory_mb=10,
    ),
    "pyiqa": Entry(
        "rewards.learned.bridges:PyIQA",
        "any metric of pyiqa for a single picture (musiq, topiq_nr, clipiqa, ...), negated if lower is better",
        needs_prompt=False,
        differentiable=True,
        range=(float("-inf"), float("inf")),
        preprocessing="the metric's own",
        licence="PolyForm Noncommercial 1.0.0, weights as each metric's",
        noncommercial=True,
        extra="pyiqa",
    ),
    "torchmetrics": Entry(
        "rewards.learned.bridges:TorchMetrics",
        "any function of torchmetrics.functional.image for a single picture, negated if lower is better",
        needs_prompt=False,
        differentiable=True,
        range=(float("-inf"), float("inf")),
        preprocessing="the function's own",
        licence="Apache-2.0",
        extra="torchmetrics",
    ),
    "text-exemplar": Entry(
        "rewards.sets.exemplar:TextExemplar",
        "cosine between the picture and the mean of some texts, in the towers of any CLIP reward",
        needs_prompt=False,
        differentiable=True,
        range=(-1, 1),
        preprocessing="the encoder's",
        licence="the encoder's",
        fetch="rewards.sets.exemplar:fetch_encoder",
    ),
    "remote": Entry(
        "rewards.network.remote:Remote",
        "the scores of `difftune rewards serve`, by its URL; on the command line the URL is the reward's name",
        needs_prompt=True,
        differentiable=False,
        range=(float("-inf"), float("inf")),
        preprocessing="rounded to 8 bits, sent as PNG",
        licence="the server's",
    ),
    "judge": Entry(
        "rewards.network.judge:Judge",
        "what a vision-language model behind a server of OpenAI's protocol (vLLM, SGLang) thinks of the picture",
        needs_prompt=True,
        differentiable=False,
        range=(0, 5),
        preprocessing="rounded to 8 bits, sent as PNG",
        licence="the model's",
    ),
    "vlm": Entry(
        "rewards.learned.vlm:VLMJudge",
        "probability that a vision-language model says yes: the picture shows the prompt, or beats a reference",
        needs_prompt=True,
        differentiable=True,
        range=(0, 1),
        preprocessing="the model's own processor, on tensors",
        licence="the model's",
        fetch="rewards.hub:fetch_model",
    ),
    "vqascore": Entry(
        "rewards.learned.vlm:vqascore",
        "VQAScore: probability among all tokens that a vision-language model says Yes, the figure shows the prompt",
        needs_prompt=True,
        differentiable=True,
        range=(0, 1),
        preprocessing="the model's own processor, on tensors",
        licence="the model's",
        fetch="rewards.hub:fetch_model",
    ),
    "vqascore-clip-flant5": Entry(
        "rewards.learned.clip_t5:CLIPFlanT5",
        "VQAScore by its authors' own CLIP-FlanT5: probability of Yes, the figure shows the prompt",
        needs_prompt=True,
        differentiable=True,
        range=(0, 1),
        resolution=336,
        preprocessing="padding to a square with CLIP's mean colour, antialiased bicubic resize, CLIP's mean and std",
        fetch="rewards.learned.clip_t5:fetch_clip_t5",
        memory_mb=12600,
    ),
    "soft-tifa": Entry(
        "rewards.learned.soft_tifa:SoftTIFA",
        "Soft-TIFA: mean probability that a vision-language model gives to the right answers about the prompt",
        needs_prompt=True,
        differentiable=True,
        range=(0, 1),
        preprocessing="the model's own processor, on tensors",
        licence="the model's",
        fetch="rewards.hub:fetch_model",
    ),
    "smooth": Entry(
        "rewards.wrappers.smoothed:smooth",
        "another reward's mean over small shifts of the picture, noise and flips: harder to fool by a gradient",
        needs_prompt=True,
        differentiable=True,
        range=(float("-inf"), float("inf")),
        preprocessing="the reward's, of each view",
        licence="the reward's",
        fetch="rewards.wrappers.smoothed:fetch_smoothed",
        wraps=True,
    ),
    "saturation": Entry(
        "rewards.simple:Saturation",
        "mean saturation of HSV: 0 gray, 1 pure colours",
        needs_prompt=False,
        differentiable=True,
        range=(0, 1),
    ),
    "contrast": Entry(
        "rewards.simple:Contrast",
        "RMS contrast, the standard deviation of luma: 0 flat, 0.5 black and white in halves",
        needs_prompt=False,
        differentiable=True,
        range=(0, 0.5),
    ),
}


def register(name: str, summary: str, **facts: Any) -> Callable[[Make], Make]:
    """Puts a reward of your own into `REWARDS`; `facts` are the other fields of `Entry`.

    >>> @register("red", "mean of the red channel", needs_prompt=False, differentiable=True, range=(0, 1))
    ... class Red: ...
    """

    def add(make: Make) -> Make:
        if name in REWARDS:
            raise RewardError(f"there is a reward {name!r} already: choose another name")
        REWARDS[name] = Entry(make, summary, **facts)
        return make

    return add


def load(name: str, batch_size: int | None = None, gradient_checkpointing: bool = False, **options: Any) -> Reward:
    """The reward of that name, or of "module:attribute" (`rewards.outside`); options may stand in the name (`spelled`).

    With `batch_size`, so many images are scored at a time; with `gradient_checkpointing`, each of these parts is scored
    again in the backward pass, so that no more than one part's graph is in memory. Neither changes a score. Raises
    ValueError, in one sentence, for a name or an option that is not known, and for one that is missing.
    """
    plain, written = spelled(name)
    make, options = imported(entry(plain).make), written | options
    known = inspect.signature(make).parameters
    parts = {"batch_size": batch_size, "gradient_checkpointing": gradient_checkpointing}
    parts |= {option: options.pop(option) for option in OF_ALL if option in options and option not in known}
    reward = _made(name, make, fitting(plain, make, options))
    if parts["batch_size"] is None and not parts["gradient_checkpointing"]:
        return reward
    batched: Callable[..., Reward] = imported("rewards.wrappers.batched:Batched")
    return batched(reward, **parts)


def _made(name: str, make: Callable[..., Reward], options: dict[str, Any]) -> Reward:
    try:
        return make(**options)
    except NotFetched as error:
        command = f"difftune rewards prefetch {shlex.quote(name)}"
        raise NotFetched(f"reward {name!r}: {error}; run `{command}` with a network first") from error


def fitting(name: str, make: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """`options`, if they are what `make` takes. Raises ValueError for one that is not known or is missing."""
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise RewardError(unknown(f"option of reward {name!r}", option, known))
    for option, about in known.items():
        if about.default is about.empty and option not in options:
            raise RewardError(f"reward {name!r} needs the option {option!r}: write {name}[{option}=...]")
    return options


def spelled(name: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of "name[key=value, key=value]", as the command line has them.

    A value is a Python literal (a number, a list, quoted text) or else the text itself, which may have options of its
    own: "smooth[reward=vlm[model=x, yes=y], shifts=4]". Raises ValueError for an option without "=", and for brackets
    that do not close.
    """
    plain, bracket, inside = name.partition("[")
    if not bracket or not name.endswith("]"):
        return name, {}
    pairs = [pair.partition("=") for pair in _options(inside[:-1])]
    for key, equals, value in pairs:
        if not equals:
            raise RewardError(f"cannot read {key!r} in {name!r}: options are KEY=VALUE, as in jpeg[quality=40]")
        if _open(value):
            raise RewardError(f"the brackets of {value[:80]!r} in {name[:80]!r} do not close")
    keys = [key.strip() for key, _, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RewardError(f"the option {twice[0][:80]!r} is given twice in {name[:80]!r}: give it once")
    return plain, {key.strip(): _literal(value) for key, _, value in pairs}


def _options(inside: str) -> list[str]:
    """The text between the brackets, divided at each comma before KEY=, except one in brackets further in."""
    first, *rest = re.split(r"(,\s*)(?=\w+=)", inside)
    options = [first]
    for comma, option in zip(rest[::2], rest[1::2], strict=True):
        if _open(options[-1]):
            options[-1] += comma + option
        else:
            options.append(option)
    return options


def _open(text: str) -> bool:
    """Whether brackets are open at its end, except those in quoted text."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    return bare.count("[") != bare.count("]")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def entry(name: str) -> Entry:
    """What is known of a reward. Raises ValueError, in one sentence that names the nearest, for an unknown name.

    A name that is not there may be another distribution's (an entry point), "module:attribute", or the URL of a server.
    A reward that is made of another, as "smooth[reward=pickscore]", has the other's facts.
    """
    name, options = spelled(name)
    if name.startswith(("http://", "https://")):
        _check_url(name)
        return replace(REWARDS["remote"], make=partial(imported("rewards.network.remote:Remote"), name))
    if name not in REWARDS and ":" in name:
        return imported("rewards.outside:described")(name)
    if name not in REWARDS:
        plugins()
    if name not in REWARDS:
        raise RewardError(unknown("reward", name, REWARDS))
    return _wrapping(REWARDS[name], options)


def _wrapping(outer: Entry, options: dict[str, Any]) -> Entry:
    """The entry of a reward that is made of another: what is known of that one, made by the outer."""
    if not outer.wraps or not isinstance(options.get("reward"), str):
        return outer
    inner, name = entry(options["reward"]), options["reward"]
    return replace(inner, make=outer.make, fetch=outer.fetch, wraps=True, summary=f"smooth {name}: {inner.summary}")


def stated(name: str) -> tuple[Entry, bool]:
    """What is known of a reward where no code of a person's own is called: `entry`, but that a "module:attribute" which
    does not say so is not tried for a gradient. The flag tells whether its `differentiable` is known."""
    plain, _ = spelled(name)
    if plain in REWARDS or ":" not in plain or plain.startswith(("http://", "https://")):
        return entry(name), True
    found: tuple[Entry, bool] = imported("rewards.outside:stated")(plain)  # type: ignore[assignment]
    return found


def _check_url(url: str) -> None:
    try:
        host = urlsplit(url).hostname if urlsplit(url).port != 0 and url.isprintable() and " " not in url else None
    except ValueError:  # brackets that are not closed, or a port that is none
        host = None
    if not host:
        raise RewardError(f"{url[:200]!r} is not an address of a reward server: write http://HOST:PORT")


@cache
def plugins() -> tuple[str, ...]:
    """Loads the entry points of other distributions, once; one sentence for each that fails.

    An entry point of the group `difftune.rewards` names a module, or something in one, whose import calls `register`.
    """
    return tuple(why for point in entry_points(group=GROUP) if (why := _failure(point)))


def _failure(point: EntryPoint) -> str:
    try:
        point.load()
    except Exception as error:  # another distribution's: whatever it raises must not take the others along
        whose = point.dist.name if point.dist else "a distribution"
        return f"reward {point.name!r} of {whose} cannot be loaded: {type(error).__name__}: {error}"
    return ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not known: the name, the nearest one and all that there are."""
    names = sorted(known)
    near = [each for each in names if _spelt(each) == _spelt(name)] or difflib.get_close_matches(name, names, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"no {kind} {name!r}{guess}; known: {', '.join(names[:MOST]) or 'none'}{more}"


MOST = 60  # names in one sentence


def _spelt(name: str) -> str:
    """A name as it is compared: CFG++ is cfgpp, and best_of_n is best-of-n."""
    return name.lower().replace("+", "p").replace("-", "").replace("_", "")


def imported(make: str | Callable[..., Any]) -> Callable[..., Any]:
    """What "module:attribute" names."""
    if callable(make):
        return make
    module, attribute = make.split(":")
    return vars(import_module(module))[attribute]
