"""A closed-form model for tests of guidance: latents (B, 2, 4, 4), three classes, patches that weaken it, and one
working example of every method."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from guidance.guided import GuidedPredict, guided
from guidance.methods.catalogue import GUIDANCE
from guidance.methods.linear_ag import LinearFit
from guidance.methods.scales import time
from solvers.denoiser import Path, Prediction
from solvers.exact import Mixture
from solvers.noise import Noise, cosine, flow, noise
from solvers.samplers.singlestep import between

SHAPE = (2, 4, 4)
B, K = 4, 3
MEANS = torch.randn(K, *SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
STD = torch.tensor(0.7, dtype=torch.float64)
BLOBS = Mixture(MEANS, STD)
WIDE = Mixture(MEANS, 1.5 * STD)
LEVELS = {"vp": cosine(0.6), "ve": noise(1.0, 3.0), "flow": flow(0.4), "pure noise": flow(1.0), "data": flow(0.0)}


@dataclass(frozen=True)
class Toy:
    """A mixture's denoiser; a patch makes it the wide one, or steers it away from the negative's class."""

    prediction_type: str = "flow"
    patch: list[str] = field(default_factory=list)
    perturbed: Mixture = WIDE

    def __call__(self, x: Tensor, at: Noise, cond) -> Prediction:
        label = {"label": cond["label"]}
        if not self.patch:
            return BLOBS(x, at, label)
        if not self.patch[-1].startswith(("nasa", "nag")):
            return self.perturbed(x, at, label)
        c, n = BLOBS(x, at, label), BLOBS(x, at, {"label": cond["negative_hidden_states"][:, 0, 0].long()})
        scale = cond["negative_scale"].view(-1, 1, 1, 1)
        return Prediction(c.x0 + scale * (c.x0 - n.x0), c.eps + scale * (c.eps - n.eps))

    @contextmanager
    def patched(self, name: str):
        self.patch.append(name)
        try:
            yield
        finally:
            self.patch.pop()


def labels(*values: int) -> dict[str, Tensor]:
    return {"label": torch.tensor(values)}


CONDS = {"cond": labels(0, 0, 1, 2), "uncond": labels(-1, -1, -1, -1), "negative": labels(2, 2, 2, 2)}
ALIKE = {name: labels(0, 0, 0, 0) for name in CONDS}


def start(n: int = B, seed: int = 0) -> Path:
    return Path(torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def classify(x0: Tensor) -> Tensor:
    """Logits (B, K) that fall with the distance to each mean, and leave doubt."""
    return -((x0[:, None] - MEANS.to(x0)) ** 2).flatten(2).mean(2)


def undecided(x0: Tensor) -> Tensor:
    return 0 * x0.flatten(1)[:, :K]


def example(name: str, levels: Sequence[Noise], alike: bool = False):
    """The method, with what it cannot do without: for the conditions CONDS, or ALIKE."""
    target = (ALIKE if alike else CONDS)["cond"]["label"]
    own = target if alike else torch.full((B,), -1)
    classes = {"label": torch.arange(K) if not alike else torch.zeros(K, dtype=torch.long)}
    negative = (target if alike else torch.full((B,), 2)).view(B, 1, 1)
    steps = len(levels) - 1
    times = tuple(map(time, levels[:-1]))
    fit = LinearFit(times, tuple((1.0,) + (0.0,) * 2 * i for i in range(steps)))
    options = {
        "linear-ag": {"fit": fit},
        "gfcg": {"classify": classify, "classes": classes, "target": target},
        "classifier": {"classify": undecided if alike else classify, "target": target},
        "cfg-zero": {"zero_steps": 0},
        "apg-mix": {"cfg_steps": 0},
        "fbg": {"delta": -0.3, "tau": 0.1},
        "cfg-mp": {"repeats": 0} if alike else {},
        "dynamic": {"scorers": (lambda x0: -classify(x0)[:, 2],)},
        "nasa": {"negative": negative},
        "nag": {"negative": negative},
        "multi": {"conds": ("cond", "negative"), "scales": (3.0, 1.0)},
        "null-text": {"key": "label", "times": times, "nulls": own.expand(steps, B)},
    }
    return GUIDANCE[name](**options.get(name, {}))


def predict(method, conds=CONDS, toy: Toy | None = None) -> GuidedPredict:
    toy = toy or Toy()
    return guided(toy, method, conds, weak=toy.perturbed)


def at_step(path: Path, at: Noise) -> Path:
    """The path within a step of Euler's method, to nine tenths of the time."""
    return replace(path, then=between(at, flow(0.0), 0.1))


def said(method, at: Noise, conds=CONDS) -> Prediction:
    return predict(method, conds)(at_step(start(), at), at)


def same(a: Prediction, b: Prediction, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.x0, b.x0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.eps, b.eps, rtol=tolerance, atol=tolerance)
