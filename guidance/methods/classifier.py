"""Guidance by a classifier of clean images, in inference mode (GFCG) and by its gradient (EluCD)."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import atan2, sin
from typing import Any

import torch
from torch import Tensor, nn

from guidance.contract import Branch, Guide, Guided
from guidance.methods.scales import Neutral, Scale, Scaled, Usual, chosen, strength
from solvers.denoiser import Cond, Path, along
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.ranges import NotNegative

Classify = Callable[[Tensor], Tensor]  # x0 (B, ...) -> logits (B, K)
Confusion = Callable[[Tensor, Tensor, Tensor], Tensor]  # p (B, K), target (B,), rival (B,) -> confusion (B,) in [0, 1]


def miss(p: Tensor, target: Tensor, rival: Tensor) -> Tensor:
    """1 - p_target."""
    return 1 - _at(p, target)


def pair(p: Tensor, target: Tensor, rival: Tensor) -> Tensor:
    """p_rival / (p_rival + p_target)."""
    return _at(p, rival) / (_at(p, rival) + _at(p, target))


def gate(p: Tensor, target: Tensor, rival: Tensor) -> Tensor:
    """1 if the classifier prefers another class, else 0."""
    return (p.argmax(1) != target).to(p.dtype)


RULES: dict[str, Confusion] = {f.__name__: f for f in (miss, pair, gate)}


def rival_of(p: Tensor, target: Tensor) -> Tensor:
    """The strongest competitor (B,) of the target class, never the target itself."""
    return p.scatter(1, target[:, None], -1.0).argmax(1)


def _at(p: Tensor, index: Tensor) -> Tensor:
    return p.gather(1, index[:, None])[:, 0]


def given(owner: str, field: str, value: Any, what: str) -> Any:
    """The value of a field that a method cannot do without; a name is not yet the thing."""
    if value is None or isinstance(value, str):
        said = "none" if value is None else f"only the name {value!r}"
        raise UserError(f"{owner} needs {field}, {what}, and was given {said}: pass it as {field}=")
    return value


@dataclass(frozen=True)
class GFCG(Scaled):
    """Gradient-free classifier guidance: away from the class that the classifier confuses the sample with
    (https://arxiv.org/abs/2411.15393).

    p = softmax(classify(x0_c)),  rival = argmax_{k != target} p_k,  s = scale * rule(p, target, rival),
    out = c + s (c - model(x | rival)) [+ (cfg_scale - 1) (c - u)].

    The rival is evaluated only for the samples with s > tolerance. network="weak": with autoguidance, at its cost:
    out = c + scale (c - weak(x | rival where the rule exceeds 1/2, else the sample's own class)).

    A reconstruction: of the paper only the abstract and a summary were at hand, so the rule (`RULES`, or a function of
    its own) and the defaults are ours. It is the largest term of c - u = sum_k p_k (c - model(x | k)), and for two
    classes "miss" is CFG of 1 + scale.

    classify: x0 (B, ...) -> logits (B, K); classes: the conditions of the K classes, tensors (K, ...); target: the
    class (B,) of each sample.
    """

    scale: Scale = 2.0
    classify: Classify | str | None = "tiny-classifier"
    classes: Cond | None = None
    target: Tensor | None = None
    cfg_scale: Scale | None = None
    rule: str | Confusion = "miss"
    tolerance: NotNegative = 0.01
    network: str = "main"
    space = "any"
    usual = Usual(0, 15, "a scale of CFG less 1: GFCG.from_cfg_scale(w)")
    neutral = Neutral({"scale": 0.0}, "none")

    @classmethod
    def from_cfg_scale(cls, scale: float, **fields: Any) -> "GFCG":
        """The scale that is CFG of `scale` for two classes under the rule "miss"."""
        return cls(scale - 1, **fields)

    def guide(self, path: Path, at: Noise) -> Guide:
        uncond = {} if self.cfg_scale is None else {"uncond": Branch("uncond")}
        preds = yield {"cond": Branch("cond"), **uncond}
        target = target_of("GFCG", self.target, path, "gfcg.target")
        rival, confusion = self._judged(preds.to("cond", "x0"), target)
        s, rows = self._strengths(confusion, at, path.x)
        reference = torch.where(confusion > 0.5, rival, target) if self.network != "main" else rival
        preds = yield {"rival": Branch(self._conditions(reference), rows, self.network)}
        c = preds["cond"]
        out = c + s * (c - chosen(rows, preds["rival"], c))
        if self.cfg_scale is not None:
            out = out + (strength(self.cfg_scale, at, path.x) - 1) * (c - preds["uncond"])
        return Guided(out.to(c.dtype), memory={"gfcg.target": target})

    @torch.no_grad()
    def _judged(self, x0: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The rival (B,) of each sample, and the rule's word (B,)."""
        classify = given("GFCG", "classify", self.classify, "a function from x0 to logits (B, K)")
        p = classify(x0).softmax(1)
        rival = rival_of(p, target)
        return rival, self._rule(p, target, rival)

    @property
    def _rule(self) -> Confusion:
        if callable(self.rule):
            return self.rule
        if self.rule not in RULES:
            raise UserError(f"no rule {self.rule!r} of GFCG; known: {', '.join(RULES)}, or a function")
        return RULES[self.rule]

    def _strengths(self, confusion: Tensor, at: Noise, x: Tensor) -> tuple[float | Tensor, Tensor | None]:
        """The factor of c - rival, and the rows (B,) that need it."""
        scale = strength(self.scale, at, x)
        if self.network != "main":
            return scale, None
        s = scale * along(confusion, x)
        rows = s.view(-1) > self.tolerance
        return torch.where(along(rows, x), s, 0.0).to(x.dtype), rows

    def _conditions(self, index: Tensor) -> Cond:
        classes = given("GFCG", "classes", self.classes, "the conditions of the classes, tensors (K, ...)")
        return {name: value[index.to(value.device)] for name, value in classes.items()}


def target_of(owner: str, target: Tensor | None, path: Path, key: str) -> Tensor:
    """The class (B,) of each sample: once known, it follows the sample in the path's memory under `key`."""
    if key in path.memory:
        return path.memory[key]
    x = path.x
    classes = given(owner, "target", target, "the class (B,) of each sample")
    if classes.shape not in ((), x.shape[:1]):
        raise UserError(f"{owner} has {len(classes)} targets for {len(x)} samples: pass one each")
    return classes.to(x.device).expand(len(x))


# ------------------------------------------------------------------------------------------------ by the gradient
@dataclass(frozen=True)
class ClassifierGuidance(Scaled):
    """Guidance by the gradient of an off-the-shelf classifier of clean images (EluCD,
    https://arxiv.org/abs/2310.11311).

    g = d/dx0 (joint f_target - log sum_k exp(joint discount f_k)),    f = classify(x0), x0 detached from the network,
    score += strength g, which is x0 += strength sigma^2 / alpha g in the coordinates with alpha^2 + sigma^2 = 1.

    discount = 1 is log p(target | x0), discount = 0 the gradient of the joint logit alone. strength = scale (1 +
    middle sin(pi t)), t = 2/pi atan(sigma / alpha): the paper's extra term for the middle of a run, as a function of
    the level (its own, gamma = 0.3, is a multiple of the largest posterior variance). For DDPM's step, score += s g
    moves the mean by s beta g / sqrt(1 - beta). At alpha = 0, where x0 says nothing yet, the prediction stays.

    classify: x0 (B, ...) -> logits (B, K), differentiable; see `smoothed`. target: the class (B,) of each sample.
    """

    scale: Scale = 1.0
    classify: Classify | str | None = "tiny-classifier"
    target: Tensor | None = None
    joint: float = 1.0
    discount: float = 0.5
    middle: float = 0.3
    space = "x0"
    neutral = Neutral({"scale": 0.0}, "none")

    def guide(self, path: Path, at: Noise) -> Guide:
        preds = yield {"cond": Branch("cond")}
        x0 = preds.to("cond", "x0")
        target = target_of("ClassifierGuidance", self.target, path, "classifier.target")
        kept = {"classifier.target": target}
        if at.alpha == 0:
            return Guided(x0, memory=kept)
        weight = float(at.sigma**2 / (at.alpha * torch.hypot(at.alpha, at.sigma))) * self._boost(at)
        push = weight * self._gradient(x0, target)
        return Guided(x0 + strength(self.scale, at, path.x) * push, memory=kept)

    def _boost(self, at: Noise) -> float:
        return 1 + self.middle * sin(2 * atan2(float(at.sigma), float(at.alpha)))

    def _gradient(self, x0: Tensor, target: Tensor) -> Tensor:
        classify = given("ClassifierGuidance", "classify", self.classify, "a function from x0 to logits (B, K)")
        with torch.enable_grad():
            x = x0.detach().requires_grad_()
            logits = classify(x)
            gain = self.joint * _at(logits, target) - (self.joint * self.discount * logits).logsumexp(1)
            return torch.autograd.grad(gain.sum(), x)[0]


def smoothed(network: nn.Module, beta: float = 3.0) -> nn.Module:
    """A copy of the classifier with Softplus(beta) in place of each ReLU, whose gradients are less adversarial; as beta
    grows it is the classifier itself."""
    copy = deepcopy(network)
    for module in copy.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta))
    return copy
