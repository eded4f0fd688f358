r"""The problem that a search solves: one interface for every particle and tree method.

A `Problem` is a stochastic sampler (levels, a prediction, eta), a reward of finished latents, and G groups of samples:
one for each prompt, searched together and never mixed. It evaluates in micro-batches, counts exactly what each group
has spent, and draws all randomness from explicit seeds, so that a group's result depends neither on the micro-batches
nor on the groups beside it. A method is a generator,

    for state in method(problem, config): ...        # stop whenever it is good enough

Its `State` holds the best finished sample of each group so far, and can be saved; `method(problem, config, saved)` goes
on from there. Randomness is a function of (seed, key), never of what was drawn before, so it needs no state.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from guidance.branches import Counter
from guidance.guided import GuidedPredict
from solvers.denoiser import Path, Predict, Prediction
from solvers.errors import UserError
from solvers.noise import Noise
from solvers.samplers.step import end, transition

PredictOf = Callable[[Tensor], Predict]  # groups (B,) int64 -> a prediction for a batch of one row per entry
Read = Callable[[Mapping[str | None, Prediction], Tensor], Tensor]  # predictions by expert, x -> what is rewarded
RewardOf = Callable[[Tensor, Tensor], Tensor]  # finished latents (B, ...), groups (B,) -> rewards (B,)


class Saved(NamedTuple):
    """All that a resumed search needs: tensors for safetensors, the rest for JSON."""

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any]


class Weighted(NamedTuple):
    """Finished samples of all groups with weights: W = softmax of log_weight within a group estimates the target."""

    x0: Tensor  # (S, ...)
    groups: Tensor  # (S,) int64
    log_weight: Tensor  # (S,)
    reward: Tensor  # (S,)


class Graph(NamedTuple):
    """The descent of samples: the nodes of trees, or the lineages of particles."""

    parent: Tensor  # (n,) int64, -1 for a root; parents come before their children
    level: Tensor  # (n,) int64, index into the problem's levels
    groups: Tensor  # (n,) int64
    value: Tensor  # (n,), a reward or an estimate of one; NaN if there is none


@dataclass(frozen=True)
class State:
    """A search after a step; each tensor has a row per group. The callables compute what is seldom needed."""

    x0: Tensor  # (G, ...), the best finished sample; NaN before there is one
    reward: Tensor  # (G,), its reward; -inf before there is one
    nfe: Tensor  # (G,) int64, network evaluations so far
    reward_calls: Tensor  # (G,) int64
    gradients: Tensor  # (G,) int64, backward passes through network and reward
    weighted: Callable[[], Weighted]  # finished samples; empty before there are any
    graph: Callable[[], Graph]
    saved: Callable[[], Saved]


class Search(Protocol):
    """A search method: `config` is its frozen dataclass, `saved` what an earlier state of the same search gave."""

    def __call__(self, problem: "Problem", config: Any, saved: Saved | None = None) -> Iterator[State]: ...


@dataclass
class RowCounter(Counter):
    """Counts, beside the sum, the network evaluations of each row of one batch."""

    each: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))  # () or (B,)

    def add(self, branches: Mapping[str, int], wanted: Sequence[Tensor | None] = ()) -> None:
        super().add(branches, wanted)
        for chosen in wanted:
            self.each = self.each + (1 if chosen is None else chosen.cpu().long())


class Answer(NamedTuple):
    """A prediction for some rows."""

    prediction: Prediction
    each: Tensor  # () or (B,) int64, the NFEs of a row


class Graded(NamedTuple):
    """Predictions for some rows by expert, what their estimates are worth, and the gradient of that."""

    answers: dict[str | None, Answer]
    rewards: Tensor  # (B,) float64
    gradients: Tensor  # (B, ...), by x


Jobs = Sequence[Callable[[], Any]]
ONE = torch.ones((), dtype=torch.int64)


def one_after_another(jobs: Jobs) -> list[Any]:
    """What the jobs give, all done here."""
    return [job() for job in jobs]


class Spent(NamedTuple):
    """The NFEs and the calls that each group has spent, each (G,) int64 and added to in place."""

    nfe: Tensor  # network evaluations; one under CFG counts two
    reward_calls: Tensor
    gradients: Tensor  # backward passes through network and reward, counted beside their forward

    @classmethod
    def nothing(cls, groups: int) -> "Spent":
        return cls(*(torch.zeros(groups, dtype=torch.int64) for _ in cls._fields))


class Best(NamedTuple):
    """The best finished sample of each group."""

    x0: Tensor  # (G, ...)
    reward: Tensor  # (G,)

    def improved(self, x0: Tensor, reward: Tensor, groups: Tensor) -> "Best":
        """The best samples after finished ones (B, ...) are taken into account; the earlier stays in a tie."""
        best, score = self.x0.clone(), self.reward.clone()
        for row, (group, value) in enumerate(zip(groups.tolist(), reward.to(score), strict=True)):
            if value > score[group]:
                best[group], score[group] = x0[row].to(best), value
        return Best(best, score)


@dataclass
class Problem:
    """A sampler, a reward and a budget for G groups.

    levels: N + 1 of them, noisiest first. predict: makes the prediction for rows of given groups, with any guidance
    inside; if it is a `GuidedPredict`, give each call's a `RowCounter()` of its own, and every network evaluation is
    counted; otherwise it is one a row. reward: of finished latents, or of estimates x0 of them. shape: of one latent.
    seeds: one per group. eta: 1 is DDPM, 0 DDIM, which most methods refuse. costs: the most NFEs that a row needs at
    each step; 1 by default. experts: unguided predictions by name, for methods that combine them on their own.
    start_scale: what multiplies the unit noise at the first level; its sigma by default, which is not every pipeline's.
    nfe_budget, reward_budget: NFEs and reward calls of each group, never exceeded. micro_batch: rows at a time.
    workers: processes that run this very search, each with a part of every batch; `do` gives all what each has done.

    Raises UserError for invalid levels, seeds, costs or eta.
    """

    levels: Sequence[Noise]
    predict: PredictOf
    reward: RewardOf
    shape: tuple[int, ...]
    seeds: Sequence[int] = (0,)
    eta: float = 1.0
    costs: Sequence[int] = ()
    experts: Mapping[str, PredictOf] = field(default_factory=dict)
    nfe_budget: int | None = None
    reward_budget: int | None = None
    micro_batch: int | None = None
    workers: int = 1
    do: Callable[[Jobs], list[Any]] = one_after_another
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    start_scale: float | None = None
    spent: Spent = field(init=False)

    def __post_init__(self):
        if len(self.levels) < 2:
            raise UserError(f"a search needs two noise levels or more, got {len(self.levels)}")
        if not self.seeds:
            raise UserError("a search needs a seed for each group, got none")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}: it must be between 0 (DDIM) and 1 (DDPM)")
        self.costs = tuple(self.costs) or (1,) * self.steps
        if len(self.costs) != self.steps:
            raise UserError(f"{len(self.costs)} costs for {self.steps} steps: give one for each step")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro_batch is {self.micro_batch}: it must be at least 1")
        self.spent = Spent.nothing(len(self.seeds))

    # ------------------------------------------------------------------------------------------ sizes and budgets

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def groups(self) -> Tensor:
        """(G,) int64: 0, 1, ..., G - 1."""
        return torch.arange(len(self.seeds))

    def cost(self, start: int = 0, stop: int | None = None) -> int:
        """The most NFEs that one sample needs from level `start` to level `stop`, the last by default."""
        return sum(self.costs[start:stop])

    def affords(self, nfe: int, reward_calls: int = 0) -> Tensor:
        """(G,) bool: the groups whose budgets hold that much more."""
        fits = torch.ones(len(self.seeds), dtype=torch.bool)
        if self.nfe_budget is not None:
            fits &= self.spent.nfe + nfe <= self.nfe_budget
        if self.reward_budget is not None:
            fits &= self.spent.reward_calls + reward_calls <= self.reward_budget
        return fits

    def needs_noise(self, method: str) -> None:
        """Raises ValueError if the sampler is deterministic: copies of a sample would never differ again."""
        if self.eta == 0:
            raise UserError(
                f"{method} needs a stochastic sampler: with eta = 0 all that descends from one sample stays the same; "
                "take eta = 1, or best-of-n or importance, which only draw new noise"
            )

    # ------------------------------------------------------------------------------------------ randomness

    def generator(self, group: int, *key: int) -> torch.Generator:
        """The generator of one draw: a function of the group's seed and of `key` alone, on the CPU."""
        digest = sha256(repr((int(self.seeds[group]), *map(int, key))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def noise(self, group: int, *key: int, n: int = 1) -> Tensor:
        """(n, ...) unit normal, the same on every device."""
        drawn = torch.randn((n, *self.shape), generator=self.generator(group, *key), dtype=self.dtype)
        return drawn.to(self.device)

    def uniform(self, group: int, *key: int, n: int = 1) -> Tensor:
        """(n,) uniform on [0, 1), float64, on the CPU."""
        return torch.rand(n, generator=self.generator(group, *key), dtype=torch.float64)

    # ------------------------------------------------------------------------------------------ the sampler

    def start(self, group: int, *key: int, n: int = 1) -> Path:
        """n samples at the first level."""
        return Path(self.begun(self.noise(group, *key, n=n)))

    def begun(self, noise: Tensor) -> Tensor:
        """Unit noise as x at the first level: times `start_scale`."""
        return (self.levels[0].sigma if self.start_scale is None else self.start_scale) * noise

    def predicted(self, path: Path, i: int, groups: Tensor, expert: str | None = None) -> Prediction:
        """The prediction at level i for rows of these groups (B,), without a gradient; of an expert if one is named."""
        with torch.no_grad():
            parts = self.parts(len(groups))
            answers = self.do([partial(self._answer, path[part], i, groups[part], expert) for part in parts])
        for part, answer in zip(parts, answers, strict=True):
            self._spend("nfe", groups[part], answer.each, self.nfe_budget)
        return joined([answer.prediction for answer in answers])

    def kernel(self, prediction: Prediction, i: int) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and deviation () of x at level i + 1 given the prediction at level i."""
        mean, std = transition(prediction, self.levels[i], self.levels[i + 1], self.eta)
        return (mean if prediction.shift is None else mean + self.levels[i + 1].alpha * prediction.shift), std

    def move(self, path: Path, prediction: Prediction, i: int, noise: Tensor) -> Path:
        """The step from level i to i + 1 with this unit normal noise (B, ...)."""
        mean, std = transition(prediction, self.levels[i], self.levels[i + 1], self.eta)
        return end(path, mean + std * noise, self.levels[i + 1], prediction)

    def score(self, x0: Tensor, groups: Tensor) -> Tensor:
        """Rewards (B,) in float64, on the CPU; counted. Raises ValueError for one that is not finite."""
        with torch.no_grad():
            parts = self.parts(len(groups))
            rewards = self.do([partial(self._rewards, x0[part], groups[part]) for part in parts])
        self._spend("reward_calls", groups, ONE, self.reward_budget)
        return torch.cat([part.double().cpu() for part in rewards])

    def graded(self, path: Path, i: int, groups: Tensor) -> tuple[Prediction, Tensor, Tensor]:
        """The prediction at level i, r(x0) (B,) of its clean estimate, and the gradient of that by x (B, ...).

        Each costs its NFEs, one reward call and one backward pass; nothing returned carries a gradient.
        """
        said, rewards, gradients = self.graded_by(path, i, groups, (None,), lambda said, x: estimate(said[None]))
        return said[None], rewards, gradients

    def graded_by(
        self, path: Path, i: int, groups: Tensor, experts: Sequence[str | None], read: Read
    ) -> tuple[dict[str | None, Prediction], Tensor, Tensor]:
        """`graded` for several predictions (None: the problem's own), scored on what `read` makes of them and x."""
        parts = self.parts(len(groups))
        found = self.do([partial(self._graded, path[part], i, groups[part], experts, read) for part in parts])
        for part, one in zip(parts, found, strict=True):
            for name in experts:
                self._spend("nfe", groups[part], one.answers[name].each, self.nfe_budget)
        self._spend("reward_calls", groups, ONE, self.reward_budget)
        self._spend("gradients", groups, ONE)
        said = {name: joined([one.answers[name].prediction for one in found]) for name in experts}
        return said, torch.cat([one.rewards for one in found]), torch.cat([one.gradients for one in found])

    def nothing_yet(self) -> Best:
        """The best samples of a search before any is finished: none."""
        shape = (len(self.seeds), *self.shape)
        found = torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
        return Best(found, torch.full(shape[:1], -torch.inf, dtype=torch.float64))

    def parts(self, rows: int) -> list[slice]:
        """Micro-batches of a batch: of the size that is given, or one for each worker."""
        size = self.micro_batch or max(ceil(rows / self.workers), 1)
        return [slice(start, start + size) for start in range(0, rows, size)]

    # ------------------------------------------------------------------------------------------ of a part of a batch

    def _answer(self, path: Path, i: int, groups: Tensor, expert: str | None = None) -> Answer:
        predict = (self.predict if expert is None else self.experts[expert])(groups)
        prediction = predict(path, self.levels[i])
        counted = isinstance(predict, GuidedPredict) and isinstance(predict.counter, RowCounter)
        return Answer(prediction, predict.counter.each if counted else ONE)  # type: ignore[attr-defined]

    def _rewards(self, x0: Tensor, groups: Tensor) -> Tensor:
        rewards = self.reward(x0, groups)
        if not rewards.isfinite().all():
            bad = int(rewards.isfinite().int().argmin())
            raise UserError(f"the reward of a sample of group {int(groups[bad])} is {float(rewards[bad])}")
        return rewards

    def _graded(self, path: Path, i: int, groups: Tensor, experts: Sequence[str | None], read: Read) -> Graded:
        with torch.enable_grad():
            x = path.x.detach().requires_grad_()
            here = Path(x, path.x0, path.memory)
            answers = {name: self._answer(here, i, groups, name) for name in experts}
            rewards = self._rewards(read({name: answer.prediction for name, answer in answers.items()}, x), groups)
            if not rewards.requires_grad:
                raise UserError("the reward gives no gradient of the latents, and this method needs one: use fk")
            (gradient,) = torch.autograd.grad(rewards.sum(), x)
        answers = {name: a._replace(prediction=detached(a.prediction)) for name, a in answers.items()}
        return Graded(answers, rewards.detach().double().cpu(), gradient)

    def _spend(self, name: str, groups: Tensor, each: Tensor, limit: int | None = None) -> None:
        account = self.spent._asdict()[name]
        account.index_add_(0, groups.cpu(), each.expand(len(groups)))
        if limit is not None and int(account.max()) > limit:
            raise UserError(f"a group has spent {int(account.max())} {name} of {limit}: `costs` is too low")


def estimate(prediction: Prediction) -> Tensor:
    """The clean estimate (B, ...) that rewards read: x0, with CFG++'s shift."""
    return prediction.x0 if prediction.shift is None else prediction.x0 + prediction.shift


def joined(predictions: Sequence[Prediction]) -> Prediction:
    """Predictions of parts of a batch, as of the whole."""
    if len(predictions) == 1:
        return predictions[0]
    shifts = [p.shift for p in predictions if p.shift is not None]
    memory = {key: torch.cat([p.memory[key] for p in predictions]) for key in predictions[0].memory}
    x0, eps = torch.cat([p.x0 for p in predictions]), torch.cat([p.eps for p in predictions])
    return Prediction(x0, eps, torch.cat(shifts) if shifts else None, memory)


def detached(prediction: Prediction) -> Prediction:
    """The same numbers, without a gradient."""
    shift = None if prediction.shift is None else prediction.shift.detach()
    memory = {key: value.detach() for key, value in prediction.memory.items()}
    return Prediction(prediction.x0.detach(), prediction.eps.detach(), shift, memory)
