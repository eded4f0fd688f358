"""The rewards that come with the package, one row of facts for each; nothing here imports a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Entry:
    """What a user must know of a reward before using it."""

    make: str | Callable[..., Any]  # "module:Class", imported by `load`, or the class itself
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
    memory_mb: int | None = 0  # of its weights, in float32; None: those of the model that you name
    fetch: str | None = None  # "module:function": downloads what its options name, in place of `weights`
    models: str | None = None  # "module:function": the models of the Hub that its options name, as ids
    wraps: bool = False  # it is made of another reward, its option `reward`, whose facts it has
    extra: str | None = None  # the extra of this distribution that it needs
    of_options: str | None = None  # "module:function" of the entry and the options: the entry that they make of it


ANY = (float("-inf"), float("inf"))
EIGHT_BITS = "rounded to 8 bits"
SENT = "rounded to 8 bits, sent as PNG"
CROP = "antialiased bicubic resize of the shorter side, centre crop, {}'s mean and std"
CLIP = CROP.format("CLIP")
PAD = "antialiased bicubic resize of the longer side, black padding, CLIP's mean and std"
SQUARE = "padding to a square with CLIP's mean colour, antialiased bicubic resize, CLIP's mean and std"
QWEN = "antialiased bicubic resize to multiples of 28 with about 200,704 pixels, CLIP's mean and std"
OWN = "the model's own, in torch"
BLIP = "rewards.learned.imagereward"
TOWERS = "rewards.learned.clip"
BRIDGES = "rewards.learned.bridges"
ORACLE = "rewards.world.oracle"

# What the rows of a kind have in common; a row says the rest.
pixels = partial(Entry, needs_prompt=False, differentiable=True)
bytes_of = partial(Entry, needs_prompt=False, range=(0.5, 300))
shapes = partial(Entry, needs_prompt=True, differentiable=False, range=(0, 1), resolution=64,
                 preprocessing="rounded to 8 bits, antialiased bilinear resize")  # fmt: skip
learned = partial(Entry, needs_prompt=True, differentiable=True)
towers = partial(learned, resolution=224, preprocessing=CLIP, text_max_len=77)
vit_h = partial(towers, memory_mb=3940)
hps = partial(vit_h, range=(0.15, 0.4), comparable_across_prompts=False, preprocessing=PAD)
beauty = partial(Entry, needs_prompt=False, differentiable=True, range=(1, 10), resolution=224, preprocessing=CLIP,
                 weights=("clip-vit-l-14",), memory_mb=1220)  # fmt: skip
any_model = partial(learned, licence="the model's", memory_mb=None)
asked = partial(any_model, range=(0, 1), preprocessing="the model's own processor, on tensors",
                fetch="rewards.hub:fetch_model")  # fmt: skip
library = partial(Entry, needs_prompt=False, differentiable=True, range=ANY, memory_mb=None)

# fmt: off
CATALOGUE: dict[str, Entry] = {
    # exact, of the world of shapes
    "oracle": shapes(
        f"{ORACLE}:Oracle", "1 if the caption holds of the shapes in the picture, else 0: exact, for evaluation"),
    "object-count": shapes(
        f"{ORACLE}:ObjectCount",
        "how far the number of shapes is from the caption's, negated: exact, for evaluation", range=(-60, 0)),
    "position": shapes(
        f"{ORACLE}:Position", "1 if two shapes stand as the caption says, else 0: exact, for evaluation"),
    "coverage": shapes(
        f"{ORACLE}:Coverage",
        "share of pixels that background and readable shapes explain; noise and running colours have less",
        needs_prompt=False),

    # computed from the pixels
    "jpeg": bytes_of(
        "rewards.jpeg:JPEG",
        "size in kB (1000 bytes) of the picture as JPEG; a negative weight asks for compressible pictures",
        differentiable=False, preprocessing=EIGHT_BITS),
    "jpeg-proxy": bytes_of(
        "rewards.jpeg:JPEGProxy",
        "estimate of the size in kB as JPEG, with a gradient; a negative weight asks for compressible pictures",
        differentiable=True),
    "brightness": pixels(
        "rewards.simple:Brightness", "distance of the mean pixel from a target, negated", range=(-1, 0)),
    "colorfulness": pixels(
        "rewards.simple:Colorfulness",
        "how colourful a picture looks, by Hasler and Suesstrunk (2003): 0 gray, 33 moderately, 109 extremely",
        range=(0, 150)),
    "symmetry": pixels(
        "rewards.simple:Symmetry", "mean difference of the picture and its mirror image, negated", range=(-1, 0)),
    "saturation": pixels(
        "rewards.simple:Saturation", "mean saturation of HSV: 0 gray, 1 pure colours", range=(0, 1)),
    "contrast": pixels(
        "rewards.simple:Contrast",
        "RMS contrast, the standard deviation of luma: 0 flat, 0.5 black and white in halves", range=(0, 0.5)),

    # embedded
    "tiny-clip": learned(
        f"{TOWERS}:tiny_clip", "cosine between picture and caption, by the embedded CLIP of the world of shapes",
        range=(-1, 1), resolution=64, preprocessing=CROP.format("the model"), memory_mb=10),
    "tiny-classifier": learned(
        "rewards.learned.classify:TinyClassifier",
        "log-probability of the caption's colour and shape, by the embedded classifier of one object",
        range=(-30, 0), resolution=64, preprocessing="antialiased bicubic resize", memory_mb=1),

    # picture and prompt by two towers
    "clip-score": towers(
        f"{TOWERS}:clip_score", "cosine between picture and prompt, by CLIP ViT-L/14 or any CLIP of transformers",
        range=(0, 0.4), licence="MIT", weights=("clip-vit-l-14",), fetch=f"{TOWERS}:fetch_clip_score", memory_mb=1711),
    "open-clip": towers(
        f"{TOWERS}:open_clip_score",
        "cosine between picture and prompt, by any model of open_clip with its pretrained tag",
        range=(0, 0.4), resolution=None, preprocessing=OWN, licence="the model's", fetch=f"{TOWERS}:fetch_open_clip",
        models=f"{TOWERS}:models_of_open_clip",        memory_mb=605),
    "clip": vit_h(
        f"{TOWERS}:clip_logit", "CLIP's logit, about 100 cosine, by ViT-H/14 of LAION-2B: ReNO's",
        range=(0, 45), preprocessing=OWN, licence="MIT", fetch=f"{TOWERS}:fetch_open_clip",
        models=f"{TOWERS}:models_of_open_clip"),
    "pickscore": vit_h(
        f"{TOWERS}:pickscore", "PickScore v1: what people prefer of two pictures of a prompt (ViT-H/14)",
        range=(15, 26), licence="MIT (of the code; the weights' is not stated here)", weights=("pickscore-v1",)),
    "hps-v2": hps(f"{TOWERS}:hps_v2", "Human Preference Score v2 (ViT-H/14)", weights=("hps-v2",)),
    "hps-v2.1": hps(f"{TOWERS}:hps", "Human Preference Score v2.1 (ViT-H/14)", weights=("hps-v2.1",)),

    # picture and prompt by one network
    "hps-v3": learned(
        "rewards.learned.hpsv3:HPSv3",
        "Human Preference Score v3 (Qwen2-VL 7B): what people prefer, of any picture and prompt",
        range=(-5, 15), preprocessing=QWEN, fetch="rewards.learned.hpsv3:fetch_hpsv3",
        models="rewards.learned.hpsv3:models_of_hpsv3", memory_mb=33200),
    "imagereward": learned(
        f"{BLIP}:ImageReward", "ImageReward v1: what people prefer, by BLIP reading the prompt over the picture",
        range=(-2.3, 2), resolution=224, preprocessing=CLIP, text_max_len=35,
        weights=("imagereward-v1", "bert-vocabulary"), memory_mb=1790),
    "cyclereward": learned(
        f"{BLIP}:CycleReward",
        "CycleReward: how well picture and prompt can be made of each other, by ImageReward's BLIP",
        range=(-5, 5), resolution=224, preprocessing=CLIP, text_max_len=128,
        licence="MIT data, weights as their cards say", fetch=f"{BLIP}:fetch_cycle_reward",
        models=f"{BLIP}:models_of_cycle_reward", weights=("bert-vocabulary",), memory_mb=1790),
    "vqascore-clip-flant5": learned(
        "rewards.learned.clip_t5:CLIPFlanT5",
        "VQAScore by its authors' own CLIP-FlanT5: probability of Yes, the figure shows the prompt",
        range=(0, 1), resolution=336, preprocessing=SQUARE, fetch="rewards.learned.clip_t5:fetch_clip_t5",
        memory_mb=12600),
    "classifier": any_model(
        "rewards.learned.classify:classifier",
        "log-probability of a class, by any image classifier of timm or transformers",
        range=(-30, 0), preprocessing=OWN, fetch="rewards.hub:fetch_model"),

    # a vision-language model is asked
    "vlm": asked(
        "rewards.learned.vlm:VLMJudge",
        "probability that a vision-language model says yes: the picture shows the prompt, or beats a reference"),
    "vqascore": asked(
        "rewards.learned.vlm:vqascore",
        "VQAScore: probability among all tokens that a vision-language model says Yes, the figure shows the prompt"),
    "soft-tifa": asked(
        "rewards.learned.soft_tifa:SoftTIFA",
        "Soft-TIFA: mean probability that a vision-language model gives to the right answers about the prompt"),
    "judge": shapes(
        "rewards.network.judge:Judge",
        "what a vision-language model behind a server of OpenAI's protocol (vLLM, SGLang) thinks of the picture",
        range=(0, 5), resolution=None, preprocessing=SENT, licence="the model's",
        of_options="rewards.network.templates:of_template"),
    "remote": shapes(
        "rewards.network.remote:Remote",
        "the scores of `difftune rewards serve`, by its URL; on the command line the URL is the reward's name",
        range=ANY, resolution=None, preprocessing=SENT, licence="the server's"),

    # the picture alone, or beside another one
    "aesthetic": beauty(
        "rewards.learned.aesthetic:Aesthetic",
        "LAION's aesthetic predictor v2, sac+logos+ava1 (CLIP ViT-L/14)"),
    "aesthetic-ava": beauty(
        "rewards.learned.aesthetic:aesthetic_ava", "LAION's aesthetic predictor v2, ava+logos (CLIP ViT-L/14)"),
    "aesthetic-v1": beauty(
        "rewards.learned.aesthetic:aesthetic_v1",
        "LAION's first aesthetic predictor, which LAION-Aesthetics is cut by (CLIP ViT-L/14)", licence="MIT"),
    "lpips": pixels(
        "rewards.learned.lpips:LPIPS",
        "minus LPIPS: how near the picture is to a reference as people see it (AlexNet)",
        range=(-1, 0), preprocessing="the reference resized to the picture's size, AlexNet's mean and std",
        licence="BSD-2-Clause; AlexNet as torchvision has it", weights=("alexnet",),
        fetch="rewards.learned.lpips:fetch_lpips", memory_mb=10),
    "pyiqa": library(
        f"{BRIDGES}:PyIQA",
        "any metric of pyiqa for a single picture (musiq, topiq_nr, clipiqa, ...), negated if lower is better",
        preprocessing="the metric's own", licence="PolyForm Noncommercial 1.0.0, weights as each metric's",
        noncommercial=True, extra="pyiqa", of_options=f"{BRIDGES}:of_metric"),
    "torchmetrics": library(
        f"{BRIDGES}:TorchMetrics",
        "any function of torchmetrics.functional.image for a single picture, negated if lower is better",
        preprocessing="the function's own", extra="torchmetrics"),
    "ocr": shapes(
        "rewards.learned.ocr:OCR", "how much of the text that the prompt quotes can be read in the picture",
        resolution=None, preprocessing=EIGHT_BITS, extra="ocr", memory_mb=32),

    # made of other rewards
    "text-exemplar": any_model(
        "rewards.sets.exemplar:TextExemplar",
        "cosine between the picture and the mean of some texts, in the towers of any CLIP reward",
        needs_prompt=False, range=(-1, 1), preprocessing="the encoder's", licence="the encoder's",
        fetch="rewards.sets.exemplar:fetch_encoder"),
    "smooth": any_model(
        "rewards.wrappers.smoothed:smooth",
        "another reward's mean over small shifts of the picture, noise and flips: harder to fool by a gradient",
        range=ANY, preprocessing="the reward's, of each view", licence="the reward's",
        fetch="rewards.wrappers.smoothed:fetch_smoothed", wraps=True),
}
