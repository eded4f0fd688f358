"""Experts beside a pipeline's own conditions, for Feynman-Kac correctors: a second prompt, or a second pipeline.

search(pipe, prompts, "fkc", experts={"other": "a blue square"}, exponents={"cond": 1, "other": 1})
search(pipe, prompts, "fkc", experts={"other": Expert(pipe=second)}, exponents={"cond": 0.5, "other": 0.5})
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from difftune.errors import UserError
from difftune.lookup import known
from guidance.search.fkc import FKC
from solvers.latent import LatentModel
from solvers.noise import Noise, log_snr

OWN = ("cond", "uncond")  # the conditions that every search has
SLACK = 0.01  # of log(sigma / alpha): schedulers keep their levels in float32
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class Expert:
    """The law of a pipeline's samples under a prompt, unguided.

    prompt: one for all prompts of the search, or one for each; None is the search's own. pipe: None is the search's
    own; another one has the same latent space. What its network predicts may differ: eps, x0, v or a flow.
    """

    prompt: str | Sequence[str] | None = None
    pipe: Any = None

    def prompts(self, name: str, prompts: Sequence[str]) -> list[str]:
        """One for each of the search's."""
        if self.prompt is None:
            return list(prompts)
        said = [self.prompt] * len(prompts) if isinstance(self.prompt, str) else list(self.prompt)
        if len(said) != len(prompts):
            raise UserError(
                f"the expert {name!r} has {len(said)} prompts in a search of {len(prompts)}: give one, or one for each"
            )
        return said


Experts = Mapping[str, str | Sequence[str] | Expert]  # a prompt, or prompts, is short for Expert(prompt)


def experts_for(method: str, config: Any, experts: Experts | None) -> dict[str, Expert]:
    """The experts of a search beside its pipeline's own. Raises UserError for a method without, for a name that is
    taken or has no exponent, and for an exponent of no expert."""
    found = {name: e if isinstance(e, Expert) else Expert(e) for name, e in (experts or {}).items()}
    if not isinstance(config, FKC):
        if found:
            raise UserError(f"{method} takes no experts: they are for fkc, which samples the product of their powers")
        return {}
    exponents = config.exponents or {}
    for name in found:
        if name in OWN:
            raise UserError(f"an expert may not be called {name!r}, as one of the pipeline's own is: rename it")
        if name not in exponents:
            raise UserError(f"the expert {name!r} has no exponent: name it in exponents, as in cond:1,{name}:1")
    for name in exponents:
        known("expert", name, (*OWN, *found))
    return found


def fitting(name: str, pipe: Any, own: LatentModel, size: tuple[int, int], levels: Sequence[Noise]) -> LatentModel:
    """The model of an expert's pipeline, for images of that size.

    Raises ValueError for one that `LatentModel` does not know, of another latent space or on another device, and for a
    network that was not trained at some of the levels: its clock would tell it the nearest one instead.
    """
    other = LatentModel(pipe, own.embedded_guidance)
    mine, its = traits(own, size), traits(other, size)
    for trait in mine:
        if its[trait] != mine[trait]:
            raise UserError(
                f"the expert {name!r} does not fit: the {trait} is {its[trait]}, and {mine[trait]} in the search"
            )
    table, asked = other.denoiser.clock.table, [-float(log_snr(at)) for at in levels[:-1]]
    if table is not None and (max(asked) > table[-1] + SLACK or min(asked) < table[0] - SLACK):
        knows, asks = (f"{exp(max(span)):.4g} to {exp(min(span)):.4g}" for span in (table, asked))
        raise UserError(f"the expert {name!r} does not fit: it knows sigma / alpha {knows}, and the search asks {asks}")
    return other


def traits(model: LatentModel, size: tuple[int, int]) -> dict[str, Any]:
    """The traits that pipelines must share so that their networks can be called with the same latents."""
    statistics = tuple(model.pipe.vae.config.get(name) for name in STATISTICS)
    return {"shape of a latent": model.shape(*size), "VAE's scale": statistics, "device": str(model.device)}
