"""The parts that a guidance method only names (classifiers, weaker networks, negatives), found for a pipeline.

`PARTS` has one function per method that needs something; a method whose fields hold the things themselves stays.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from difftune import models
from difftune.errors import UserError
from guidance.contract import Guidance
from guidance.guided import GuidedPredict, guided
from guidance.methods.catalogue import (
    FBG,
    GFCG,
    GUIDANCE,
    NAG,
    NASA,
    AutoGuidance,
    CFGZeroStar,
    ClassifierGuidance,
    DynamicCFG,
    LinearAG,
    MultiCondition,
    NullTextInversion,
    PerpNeg,
)
from guidance.methods.classifier import smoothed
from guidance.methods.linear_ag import Recorded, fit_linear_ag
from rewards.registry import load
from rewards.world.classifier import CLASSES, load_classifier
from rewards.world.render import RESOLUTION
from solvers.denoiser import Cond, Path
from solvers.families.streams import MASKS
from solvers.families.table import family_of
from solvers.latent import LatentModel
from solvers.levels import prediction_type
from solvers.samplers.catalogue import euler, sample

Prompts = Sequence[str]


class Equipped(NamedTuple):
    """A guidance method with all that it needs of a pipeline, which is looked up and encoded once for a whole run."""

    method: Callable[[Prompts], Any]  # prompts -> the method for a batch of them; it loads and encodes nothing
    networks: Mapping[str, Any]  # those beside the pipeline's own, by the names that the method uses


def guided_by(
    model: LatentModel, equipped: Equipped, texts: Prompts, conds: Mapping[str, Cond], counter: Any = None
) -> GuidedPredict:
    """What a solver calls for rows with these prompts and conditions, the networks of the method among its own."""
    predict = guided(model.denoiser, equipped.method(texts), conds, counter=counter)
    others = {name: replace(model.denoiser, network=network) for name, network in equipped.networks.items()}
    return replace(predict, networks={**predict.networks, **others})


def fixed(method: Any, networks: Mapping[str, Any] | None = None) -> Equipped:
    """A method that is the same whatever the prompts."""
    return Equipped(lambda prompts: method, networks or {})


RUNS = 16  # that LinearAG is fitted to, at least
FIT_SEED = 20_231_219  # of their noise: none that images are drawn with by default


@torch.no_grad()
def equip(pipe: Any, guidance: Guidance) -> Equipped:
    """Find all that a method needs of a pipeline, and the networks that it names.

    Raises UserError for what must be given, or is not known; so does `Equipped.method`, for a prompt that the method
    cannot serve.
    """
    method: Any = guidance
    if "method" in vars(method):
        inner = equip(pipe, method.method)
        return Equipped(lambda prompts: replace(method, method=inner.method(prompts)), inner.networks)
    find = PARTS.get(type(method))
    return fixed(method) if find is None else find(pipe, method)


@torch.no_grad()
def prepared(pipe: Any, guidance: Guidance, prompts: Sequence[str], steps: int) -> Guidance:
    """The method with what is found once for a whole run: LinearAG's fit to CFG runs of the first prompts, and FBG's
    constants."""
    method: Any = guidance
    if "method" in vars(method):
        return replace(method, method=prepared(pipe, method.method, prompts, steps))
    if isinstance(method, FBG) and method.prior < 1:
        return FBG.of_levels(LatentModel(pipe).levels(steps), **_given(method))
    if not isinstance(method, LinearAG) or method.fit is not None:
        return guidance
    if scale := scale_setting(pipe):
        raise UserError(
            f"LinearAG needs the unconditional branch, and this network was distilled over guidance scales ({scale}):"
            " take a method that needs 'cond' alone (--guidance none)"
        )
    texts = (list(prompts) * RUNS)[: max(RUNS, min(len(prompts), 4 * RUNS))]
    latent, levels = LatentModel(pipe), LatentModel(pipe).levels(steps)
    predict = guided(latent.denoiser, Recorded(method.scale), latent.encode(texts))
    noise = latent.noise(len(texts), torch.Generator().manual_seed(FIT_SEED))
    *_, end = sample(euler, predict, Path(latent.start_scale(levels) * noise), levels)
    return replace(method, fit=fit_linear_ag(end.memory["recorded.cond"], end.memory["recorded.uncond"], levels))


def _given(method: Any) -> dict[str, Any]:
    """The fields of a method that are not None."""
    return {name: value for name, value in vars(method).items() if value is not None}


# ------------------------------------------------------------------------------------------------ in training

UNTRAINABLE: dict[type, str] = {
    LinearAG: "is fitted to the model that training changes",
    FBG: "follows each sample down one run",
    GFCG: "needs the class of each prompt",
    ClassifierGuidance: "needs the class of each prompt",
    DynamicCFG: "needs scorers of each prompt",
    NullTextInversion: "needs the embeddings of one picture",
}


def check_trainable(guidance: Guidance, scheduler: Callable[[], Any]) -> None:
    """UserError for a method that a recipe cannot train under, or that lacks what its settings must give.

    scheduler: gives the model's, or None if that is not at hand; CFG-Zero*'s left out steps are for flows alone.
    """
    method: Any = guidance
    if "method" in vars(method):
        check_trainable(method.method, scheduler)
    if type(method) in UNTRAINABLE:
        name = next(name for name, kind in GUIDANCE.items() if kind is type(method))
        raise UserError(
            f"guidance {name!r} {UNTRAINABLE[type(method)]}, so no recipe trains under it: choose another, such as cfg"
        )
    if isinstance(method, CFGZeroStar) and method.zero_steps:
        _check_flow(scheduler())
    if isinstance(method, PerpNeg):
        _check_negatives(method)
    if isinstance(method, NASA | NAG):
        _check_negative(method)
    if isinstance(method, AutoGuidance):
        models.check_model(_model_of(method.network))


@torch.no_grad()
def trainable(pipe: Any, guidance: Guidance) -> tuple[Guidance, Mapping[str, Any]]:
    """The method with all that it needs, whatever the prompts, and the networks that it names."""
    check_trainable(guidance, lambda: pipe.scheduler)
    found = equip(pipe, guidance)
    return found.method(()), found.networks


def _check_flow(scheduler: Any) -> None:
    if scheduler is not None and (space := prediction_type(scheduler)) != "flow":
        raise UserError(
            f"guidance 'cfg-zero' leaves out first steps of a flow, and this model predicts {space}: "
            "give --guidance.zero_steps 0"
        )


# ------------------------------------------------------------------------------------------------ each method's parts


def networks_named(pipe: Any, guidance: Guidance) -> dict[str, Any]:
    """The networks beside the pipeline's own that a method names, by name. UserError for one that does not fit."""
    method: Any = guidance
    if "method" in vars(method):
        return networks_named(pipe, method.method)
    if isinstance(method, GFCG) and method.network != "main":
        return _networks(pipe, method.network, "gfcg")
    return _networks(pipe, method.network, "autoguidance") if isinstance(method, AutoGuidance) else {}


def _weak(pipe: Any, method: AutoGuidance) -> Equipped:
    return fixed(method, networks_named(pipe, method))


def _networks(pipe: Any, name: str, owner: str) -> dict[str, Any]:
    """{name: the network of the model of that name}; "weak" is tiny's own. UserError for one that does not fit."""
    network = _network(_model_of(name))
    own = pipe.components[family_of(pipe).denoisers[0]]
    unlike = [size for size in SIZES if network.config.get(size) != own.config.get(size)]
    if type(network) is not type(own) or unlike:
        raise UserError(
            f"the weaker network {name!r} of {owner} does not fit {type(pipe).__name__}, which has another"
            f" {unlike[0] if unlike else 'class of network'}: name another with --guidance.network, in Python"
            " AutoGuidance(network=...)"
        )
    return {name: (network if network.dtype == own.dtype else _cast(network, own.dtype)).to(own.device)}


# What a network is given: the sizes of its latents and of its conditions, by the names that its config may have.
SIZES = (
    *("in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim", "caption_channels"),
    *("text_dim", "cap_feat_dim", "addition_embed_type"),
)


@cache
def _cast(network: Any, dtype: torch.dtype) -> Any:
    """A copy: the network itself, whose weights a narrower type would round, may serve another pipeline."""
    return deepcopy(network).to(dtype)


def _model_of(name: str) -> str:
    return "tiny-weak" if name == "weak" else name


@cache
def _network(model: str) -> Any:
    try:
        pipe = models.load(model)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    return pipe.components[family_of(pipe).denoisers[0]].requires_grad_(False)


def _gfcg(pipe: Any, method: GFCG) -> Equipped:
    networks = networks_named(pipe, method)
    if not isinstance(method.classify, str):
        return fixed(method, networks)
    classify, classes = _classifier(pipe, method.classify), encoded(pipe, TEXTS)
    found = replace(method, classify=classify, classes=classes)
    return Equipped(lambda prompts: replace(found, target=targets(prompts)), networks)


def _classifier_guidance(pipe: Any, method: ClassifierGuidance) -> Equipped:
    if not isinstance(method.classify, str):
        return fixed(method)
    found = replace(method, classify=_classifier(pipe, method.classify))
    return Equipped(lambda prompts: replace(found, target=targets(prompts)), {})


TEXTS = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES]  # a prompt for each class


def targets(prompts: Sequence[str]) -> Tensor:
    """The class (B,) of each prompt, which must be one of `TEXTS`."""
    for prompt in prompts:
        if prompt not in TEXTS:
            raise UserError(f"prompt {prompt!r} is not a class of tiny-classifier; its classes: {', '.join(TEXTS)}")
    return torch.tensor([TEXTS.index(prompt) for prompt in prompts])


def _classifier(pipe: Any, name: str) -> Callable[[Tensor], Tensor]:
    if name != "tiny-classifier":
        raise UserError(f"no classifier {name!r}; known: tiny-classifier, and from Python any function of x0")
    latent, classifier = latent_model(pipe), smoothed(_loaded_classifier()).to(pipe.device)

    def classify(x0: Tensor) -> Tensor:
        images = pictures_of(latent, x0)
        return classifier(F.interpolate(images, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True))

    return classify


def pictures_of(latent: LatentModel, x0: Tensor) -> Tensor:
    """The pictures (B, 3, H, W) of clean latents, as `attach` or our own loop has them: FLUX.2's patches are channels
    in ours alone. UserError for films."""
    patch = latent.family.latents.patch
    apart = patch > 1 and x0.shape[1] * patch**2 == latent.shape()[0]
    images = latent.decode(F.pixel_unshuffle(x0, patch) if apart else x0)
    if images.ndim != 4:
        raise UserError(f"classifiers and scorers judge pictures, and these are films of {images.shape[2]} frames")
    return images


@cache
def _loaded_classifier() -> Any:
    return load_classifier()


def _dynamic(pipe: Any, method: DynamicCFG) -> Equipped:
    scorers = [_scorer(pipe, scorer) for scorer in method.scorers]
    return Equipped(lambda prompts: replace(method, scorers=tuple(scorer(prompts) for scorer in scorers)), {})


def _scorer(pipe: Any, scorer: Any) -> Callable[[Prompts], Callable[[Tensor], Tensor]]:
    """Prompts -> a function of their x0."""
    if not isinstance(scorer, str):
        return lambda prompts: scorer
    try:
        reward = load(scorer)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    latent = latent_model(pipe)
    return lambda prompts: lambda x0: reward(pictures_of(latent, x0), prompts)


def _perp_neg(pipe: Any, method: PerpNeg) -> Equipped:
    _check_negatives(method)
    return fixed(replace(method, negatives=tuple(_encoded(pipe, n) for n in method.negatives)))


def _check_negatives(method: PerpNeg) -> None:
    if method.negatives == PerpNeg.negatives:
        raise UserError(
            "perpneg has no negative prompt: give --guidance.negatives, separated by semicolons; in Python"
            ' PerpNeg(negatives=("a dog",))'
        )


def _multi(pipe: Any, method: MultiCondition) -> Equipped:
    return fixed(replace(method, conds=tuple(c if c == "cond" else _encoded(pipe, c) for c in method.conds)))


def _in_attention(pipe: Any, method: NASA | NAG) -> Equipped:
    _check_negative(method)
    if not isinstance(method.negative, str):
        return fixed(method)
    return fixed(replace(method, negative=_tokens(_encoded(pipe, method.negative))))


def _tokens(cond: Cond) -> Tensor:
    """The hidden states (1, L, D) of a text, without those that its mask leaves out."""
    masks = [cond[name][0].bool() for name in MASKS if name in cond]
    return cond["encoder_hidden_states"][:, masks[0]] if masks else cond["encoder_hidden_states"]


def _check_negative(method: NASA | NAG) -> None:
    if method.negative is None:
        raise UserError(
            f"{(name := type(method).__name__)} has no negative prompt: give --guidance.negative; in Python "
            f"{name}(negative='a dog')"
        )


def _encoded(pipe: Any, text: str | Cond) -> Cond:
    """The condition of a prompt, one row."""
    return encoded(pipe, text) if isinstance(text, str) else text


def encoded(pipe: Any, texts: str | Sequence[str]) -> Cond:
    """What prompts are to the network, without a guidance scale, which the run tells it."""
    cond = latent_model(pipe).encode(texts)["cond"]
    return {name: value for name, value in cond.items() if name not in ("guidance", "timestep_cond")}


def scale_setting(pipe: Any) -> str:
    """The setting that says that the network is told a guidance scale, "guidance_embeds=True"; "" if it is not."""
    family = family_of(pipe)
    value = pipe.components[family.denoisers[0]].config.get(family.embeds)
    return f"{family.embeds}={value}" if value else ""


def latent_model(pipe: Any) -> LatentModel:
    """The pipeline's texts, pictures and latents; its network is not evaluated, so that any scale serves."""
    return LatentModel(pipe, embedded_guidance=1.0 if scale_setting(pipe) else None)


PARTS: dict[type, Callable[[Any, Any], Equipped]] = {
    AutoGuidance: _weak,
    GFCG: _gfcg,
    ClassifierGuidance: _classifier_guidance,
    DynamicCFG: _dynamic,
    PerpNeg: _perp_neg,
    MultiCondition: _multi,
    NASA: _in_attention,
    NAG: _in_attention,
}
