"""A diffusers pipeline, prompts and a reward as the problem that a search method solves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from difftune.pipelines.method_parts import Equipped, equip, fixed, guided_by
from difftune.search_runs.experts import Expert, fitting
from guidance.branches import Counter
from guidance.contract import Guidance
from guidance.guided import GuidedPredict
from guidance.methods.cfg import Plain
from guidance.search.problem import Problem, RowCounter
from rewards.compose import WeightedSum
from solvers.denoiser import Cond, Path, Prediction
from solvers.latent import LatentModel
from solvers.noise import Noise

SEED = 31  # of the numbers that costs are measured with


@dataclass(frozen=True)
class Adapter:
    """A pipeline, prompts and a reward as what `Problem` asks for; `others` are those of experts."""

    model: LatentModel
    prompts: list[str]
    reward: WeightedSum
    height: int | None = None
    width: int | None = None
    others: Mapping[str, "Adapter"] = field(default_factory=dict)

    def with_experts(self, experts: Mapping[str, Expert], levels: Sequence[Noise]) -> "Adapter":
        """The same with these experts, each of which must fit."""
        height, width = size = self.model.size(self.height, self.width)
        others = {}
        for name, expert in experts.items():
            own = expert.pipe is None or expert.pipe is self.model.pipe
            model = self.model if own else fitting(name, expert.pipe, self.model, size, levels)
            others[name] = Adapter(model, expert.prompts(name, self.prompts), self.reward, height, width)
        return replace(self, others=others)

    @property
    def other_models(self) -> list[LatentModel]:
        return [other.model for other in self.others.values()]

    def problem(
        self,
        levels: Sequence[Noise],
        guidance: Guidance,
        negative_prompts: str | Sequence[str] | None = None,
        seed: int = 0,
        eta: float = 1.0,
    ) -> Problem:
        """A group for each prompt, of seed, seed + 1, ...; budgets are the caller's.

        Whatever the guidance needs, its conditions and the prompts are encoded here, once for the whole search.
        """
        conds, equipped = self.conds(negative_prompts), equip(self.model.pipe, guidance)
        predict = self.predictor(equipped, conds)  # a prompt that the method cannot serve is refused here
        shape = self.model.shape(self.height, self.width)
        seeds = [seed + i for i in range(len(self.prompts))]
        experts = {name: self.expert(cond) for name, cond in conds.items()}
        experts |= {name: other.expert(other.conds()["cond"]) for name, other in self.others.items()}
        costs = [self.cost(predict, at, shape) for at in levels[:-1]]
        device, scale = self.model.device, self.model.start_scale(levels)
        return Problem(
            levels, predict, self.scores, shape, seeds, eta, costs, experts, device=device, start_scale=scale
        )

    @torch.no_grad()
    def conds(self, negative_prompts: str | Sequence[str] | None = None) -> dict[str, Cond]:
        return self.model.encode(self.prompts, negative_prompts, self.height, self.width)

    def expert(self, cond: Cond) -> Callable[[Tensor], GuidedPredict]:
        """The unguided prediction under a condition of all prompts."""
        return self.predictor(fixed(Plain()), {"cond": cond})

    def predictor(self, equipped: Equipped, conds: Mapping[str, Cond]) -> Callable[[Tensor], GuidedPredict]:
        """The guided prediction for rows of given groups; the networks and their clock are looked up once."""
        return partial(self.rows, guided_by(self.model, equipped, self.prompts, conds), equipped)

    def rows(self, every: GuidedPredict, equipped: Equipped, groups: Tensor) -> GuidedPredict:
        """The prediction `every` of all prompts for rows of these groups, with a counter of its own."""
        conds = {name: rows_of(cond, groups) for name, cond in every.conds.items()}
        method = equipped.method(self.texts(groups))
        return replace(every, guidance=method, conds=conds, counter=RowCounter())

    def texts(self, groups: Tensor) -> list[str]:
        return [self.prompts[group] for group in groups.tolist()]

    def scores(self, x0: Tensor, groups: Tensor) -> Tensor:
        """The total reward (B,) of latents."""
        return self.reward(self.model.decode(x0, checkpointed=x0.requires_grad), self.texts(groups))

    def cost(self, predict: Callable[[Tensor], GuidedPredict], at: Noise, shape: tuple[int, ...]) -> int:
        """The rows that guidance may ask for at a level, for one sample: tried on random answers in place of networks,
        so that nothing is settled early."""
        real, counter = predict(torch.zeros(1, dtype=torch.int64)), Counter()
        blind = {name: Blind(denoise.prediction_type) for name, denoise in real.networks.items()}
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(SEED)).to(self.model.device)
        replace(real, networks=blind, counter=counter)(Path(x), at)
        return counter.rows


class Blind:
    """Random answers in place of a network's, to see what a guidance method asks for."""

    def __init__(self, prediction_type: str):
        self.prediction_type = prediction_type
        self.generator = torch.Generator().manual_seed(SEED)

    def __call__(self, x: Tensor, at: Noise, cond: Cond) -> Prediction:
        x0, eps = (torch.randn(x.shape, generator=self.generator).to(x) for _ in range(2))
        return Prediction(x0, eps)

    @contextmanager
    def patched(self, name: str) -> Iterator[None]:
        yield


def rows_of(cond: Cond, groups: Tensor) -> Cond:
    """A condition's rows of these groups."""
    return {name: value[groups.to(value.device)] for name, value in cond.items()}
