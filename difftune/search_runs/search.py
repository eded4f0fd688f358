"""Search at inference on a diffusers pipeline: particles and trees that raise a reward, weights and network untouched.

    from difftune import search

    best = search(pipe, prompts, method="dts-star", rewards={"tiny-clip": 1.0}, budget=800, seed=0)
    best.images, best.rewards, best.nfe, best.reward_calls, best.history

    for live in search(pipe, prompts, method="fk", rewards={"tiny-clip": 1.0}, budget=800):
        ...                     # `live` has the same; stop whenever it is good enough

What is searched is the law of the pipeline's own sampler with eta = 1 (flow models: its stochastic conversion), with
any guidance inside. `guidance.search.catalogue.SEARCHES` has the methods, and each one's settings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from difftune.errors import RunError, UserError
from difftune.lookup import at_least, known, reward_named
from difftune.pipelines.engine import frozen, held
from difftune.pipelines.method_parts import equipped, prepared
from difftune.search_runs.experts import Expert, Experts, experts_for, fitting
from guidance.branches import Counter
from guidance.contract import Guidance
from guidance.guided import GuidedPredict, guided
from guidance.methods.cfg import CFG, Plain
from guidance.search.catalogue import SEARCHES
from guidance.search.dts import DTS
from guidance.search.fkc import FKC
from guidance.search.population import size_for
from guidance.search.problem import Problem, RowCounter, Saved, State, estimate
from guidance.search.selection import SVDD, Beam
from rewards.compose import WeightedSum
from rewards.registry import Reward
from solvers.denoiser import Cond, Path, Prediction
from solvers.latent import LatentModel
from solvers.memory.budget import parse_size, size_text
from solvers.memory.live import LiveBytes, measured
from solvers.noise import Noise

GRADIENTS = {"tds"}  # methods that differentiate the reward
SEED = 31  # of the numbers that costs are measured with


class Point(NamedTuple):
    """One point of a search's curve; each is a number per prompt."""

    nfe: list[int]
    reward_calls: list[int]
    reward: list[float]  # the best so far; -inf before a sample is finished


@dataclass(frozen=True)
class Found:
    """What a search has found so far, a row for each prompt; `history` is its curve up to here."""

    state: State
    history: tuple[Point, ...]
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def images(self) -> Tensor:
        """(P, 3, H, W) in [0, 1], on the CPU: the best finished sample of each prompt; NaN before there is one."""
        return decoded(self.decode, self.state.x0)

    @property
    def latents(self) -> Tensor:
        """(P, C, h, w): what the images were decoded from."""
        return self.state.x0

    @property
    def rewards(self) -> Tensor:
        """(P,) float64."""
        return self.state.reward

    @property
    def nfe(self) -> Tensor:
        """(P,) network evaluations of each prompt: one under CFG counts two."""
        return self.state.nfe

    @property
    def reward_calls(self) -> Tensor:
        """(P,) reward calls of each prompt, each with a decoding."""
        return self.state.reward_calls


@torch.no_grad()
def decoded(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Images on the CPU, one at a time: a decoder's activations are the largest there are."""
    return torch.cat([decode(latent[None]).float().cpu() for latent in latents])


@dataclass
class Search:
    """A search that runs as it is iterated; asked for `images`, `rewards`, `nfe`, `reward_calls` or `history`, it runs
    to its end first. `problem` counts what was spent."""

    problem: Problem
    method: str
    states: Iterator[State]
    pipe: Any
    progress: bool = True
    history: tuple[Point, ...] = ()
    others: tuple[Any, ...] = ()  # the pipelines of experts
    _last: Found | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Found]:
        """The best so far after each step of the method."""
        yield from self._steps

    def result(self) -> Found:
        """The end of the search."""
        for _ in self:
            pass
        if self._last is None:
            raise RunError(f"{self.method} found nothing within its budget: raise the budget")
        return self._last

    @property
    def images(self) -> Tensor:
        return self.result().images

    @property
    def rewards(self) -> Tensor:
        return self.result().rewards

    @property
    def nfe(self) -> Tensor:
        return self.result().nfe

    @property
    def reward_calls(self) -> Tensor:
        return self.result().reward_calls

    @cached_property
    def _steps(self) -> Iterator[Found]:
        return self._run()

    def _run(self) -> Iterator[Found]:
        decode = LatentModel(self.pipe).decode
        with tqdm(total=self._total(), desc=self.method, unit="NFE", disable=None if self.progress else True) as bar:
            for state in self._unwatched():
                self.history = appended(self.history, state)
                self._last = Found(state, self.history, decode)
                bar.set_postfix(standing(state), refresh=False)
                bar.update(int(state.nfe.sum()) - bar.n)
                yield self._last

    def _total(self) -> int | None:
        return None if self.problem.budget is None else self.problem.budget * len(self.problem.seeds)

    def _unwatched(self) -> Iterator[State]:
        """The states; while a step runs, and only then, no parameter asks for a gradient."""
        while True:
            with frozen(self.pipe, *self.others):
                state = next(self.states, None)
            if state is None:
                return
            yield state


def standing(state: State) -> dict[str, str]:
    """What a progress bar says beside the NFEs: the mean over prompts of the best reward so far, and all calls."""
    best = float(state.reward.mean())
    said = {"best reward": f"{best:.4f}"} if best > -torch.inf else {}
    return {**said, "reward calls": str(int(state.reward_calls.sum()))}


def appended(history: tuple[Point, ...], state: State) -> tuple[Point, ...]:
    """The curve with another point; of a flat stretch, the ends alone."""
    point = Point(state.nfe.tolist(), state.reward_calls.tolist(), state.reward.tolist())
    flat = len(history) > 1 and history[-1].reward == history[-2].reward == point.reward
    return (*(history[:-1] if flat else history), point)


@contextmanager
def worded() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def search(
    pipe: Any,
    prompts: str | Sequence[str],
    method: str = "dts-star",
    rewards: Mapping[str, float] | Reward | None = None,
    budget: int | None = 800,
    seed: int = 0,
    *,
    guidance: Guidance | None = None,
    experts: Experts | None = None,
    num_inference_steps: int = 25,
    eta: float = 1.0,
    reward_budget: int | None = None,
    memory_budget: str | None = None,
    micro_batch: int | None = None,
    negative_prompts: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
    saved: Saved | None = None,
    **settings: Any,
) -> Search:
    """A search for images of high reward, one for each prompt: to be iterated, or asked for its `images`.

    method: of `SEARCHES`; `settings` are its config's. rewards: weights by name ({"tiny-clip": 1.0}, the default), or a
    reward. budget, reward_budget: network evaluations and reward calls of each prompt, never exceeded; None is no
    limit. seed: the i-th prompt's randomness is that of seed + i, whichever run beside it. guidance: inside the search;
    CFG(5) by default. experts: of fkc, beside "cond" and "uncond": prompts, or an `Expert` with a pipeline of its own,
    by the names that `exponents` has. eta: 1 is DDPM; 0, DDIM, is for best-of-n and importance alone. memory_budget
    ("6GiB", weights included): one row is measured, and as many are run at a time as fit beside the samples that the
    budgets pay for; micro_batch sets them by hand. saved: what a state's `saved()` gave, to go on from; the budgets may
    have grown.
    Raises UserError, before anything runs, for what is unknown or cannot be.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise UserError("the list of prompts is empty: give at least one")
    config = configured(method, settings)
    named = experts_for(method, config, experts)
    reward = reward_named({"tiny-clip": 1.0} if rewards is None else rewards, gradient=method in GRADIENTS)
    at_least(1, num_inference_steps=num_inference_steps, budget=budget or 1, reward_budget=reward_budget or 1)
    adapter = Adapter(LatentModel(pipe), prompts, reward, height, width)
    levels = adapter.model.levels(num_inference_steps, height, width)
    guidance = prepared(pipe, guidance or CFG(5.0), prompts, num_inference_steps)
    with worded():
        adapter = adapter.with_experts(named, levels)
        problem = adapter.problem(levels, guidance, negative_prompts, seed, eta)
        if eta == 0 and method not in ("best-of-n", "importance"):
            problem.needs_noise(method)
    problem.budget, problem.reward_budget = budget, reward_budget
    problem.micro_batch = micro_batch or adapter.micro_batch(problem, config, memory_budget, method in GRADIENTS)
    with worded():
        states = SEARCHES[method].search(problem, config, saved)
    others = tuple(other.model.pipe for other in adapter.others.values())
    return Search(problem, method, states, pipe, progress, others=others)


def configured(method: str, settings: Mapping[str, Any]) -> Any:
    """The settings of a method. Raises UserError for one that is unknown or cannot be."""
    make = SEARCHES[known("search method", method, SEARCHES)].config
    for name in settings:
        known(f"setting of {method}", name, make.__dataclass_fields__)
    with worded():
        return make(**settings)


# ------------------------------------------------------------------------------------------------ the adapter


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

    def problem(
        self,
        levels: Sequence[Noise],
        guidance: Guidance,
        negative_prompts: str | Sequence[str] | None = None,
        seed: int = 0,
        eta: float = 1.0,
    ) -> Problem:
        """A group for each prompt, of seed, seed + 1, ...; budgets are the caller's."""
        conds = self.conds(negative_prompts)

        def predict(groups: Tensor) -> GuidedPredict:
            return self.guided(guidance, conds, groups)

        shape = self.model.shape(self.height, self.width)
        seeds = [seed + i for i in range(len(self.prompts))]
        experts = {name: self.expert(cond) for name, cond in conds.items()}
        experts |= {name: other.expert(other.conds()["cond"]) for name, other in self.others.items()}
        costs = [self.cost(predict, at, shape) for at in levels[:-1]]
        return Problem(levels, predict, self.scores, shape, seeds, eta, costs, experts, device=self.model.device)

    @torch.no_grad()
    def conds(self, negative_prompts: str | Sequence[str] | None = None) -> dict[str, Cond]:
        return self.model.encode(self.prompts, negative_prompts, self.height, self.width)

    def expert(self, cond: Cond) -> Callable[[Tensor], GuidedPredict]:
        """The unguided prediction under a condition of all prompts."""
        return lambda groups: self.guided(Plain(), {"cond": cond}, groups)

    def guided(self, guidance: Guidance, conds: Mapping[str, Cond], groups: Tensor) -> GuidedPredict:
        """The guided prediction for rows of these groups, with what the method needs for their prompts."""
        method, networks = equipped(self.model.pipe, guidance, self.texts(groups))
        denoise = self.model.denoiser
        others = {name: replace(denoise, network=network) for name, network in networks.items()}
        rows = {name: rows_of(cond, groups) for name, cond in conds.items()}
        predict = guided(denoise, method, rows, counter=RowCounter())
        return replace(predict, networks={**predict.networks, **others})

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

    def micro_batch(self, problem: Problem, config: Any, memory_budget: str | None, gradient: bool) -> int | None:
        """The rows at a time that keep the predicted peak within the budget; all of them without one."""
        if memory_budget is None:
            return None
        with worded():
            limit = parse_size(memory_budget)
        group, i = torch.zeros(1, dtype=torch.int64), problem.steps - 1
        x, said = problem.start(0, -1).x, list[Prediction]()

        def scored(x: Tensor) -> list[Tensor]:
            for name in self.others:
                problem.experts[name](group)(Path(x), problem.levels[i])
            said[:] = [problem.predict(group)(Path(x), problem.levels[i])]
            return [self.scores(estimate(said[0]), group)]

        models = [other.model for other in self.others.values()]
        with frozen(self.model.pipe, *(model.pipe for model in models)):
            peak = measured(scored, x).peak if gradient else forward_peak(lambda: scored(x))
        base = held(self.model, 0, *models) + kept(problem, config, said[0], gradient)
        if base + peak > limit:
            enough = size_text(base + peak)
            raise UserError(
                f"memory_budget {memory_budget} is too small: one row at a time takes {enough}, with the model and the "
                f"{paid(problem, config)} samples that the budgets pay for"
            )
        return (limit - base) // max(peak, 1)


def alive(problem: Problem, config: Any) -> int:
    """The samples, of all prompts, that are on their way at once, at most."""
    if isinstance(config, DTS):
        return len(problem.seeds) * config.parallel
    each = config.candidates if isinstance(config, SVDD | Beam) else 1
    return len(problem.seeds) * each * size_for(problem, config.particles, each * problem.cost(), each)


def paid(problem: Problem, config: Any) -> int:
    """The samples, of all prompts, that the budgets pay for; without a budget, those of one run."""
    if problem.budget is problem.reward_budget is None:
        return alive(problem, config)
    return len(problem.seeds) * size_for(problem, None, problem.cost(), 1)


def kept(problem: Problem, config: Any, said: Prediction, gradient: bool) -> int:
    """The most bytes that samples take on the device beside the rows that a network is run on. said: of one row.

    Those on their way have each their state and what was last said of it, twice, since a step makes them anew, and what
    a step computes between. Finished ones are gathered; a tree has, on the CPU, a state for each node instead: a
    rollout's levels, and pure noise.
    """
    latent, memory = said.x0.nbytes, sum(value.nbytes for value in said.memory.values())
    predictions = len(problem.experts) + 1 if isinstance(config, FKC) else 1  # the experts', and their mixture
    latents = 2 * (2 + 2 * predictions + (said.shift is not None) + gradient) + (8 if gradient else 2)
    going = alive(problem, config) * (latents * latent + 4 * memory)
    if not isinstance(config, DTS):
        return going + 2 * paid(problem, config) * latent
    nodes = paid(problem, config) * (config.branches + 1) if torch.device(problem.device).type == "cpu" else 0
    return going + nodes * (latent + memory)


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


def forward_peak(function: Callable[[], Any]) -> int:
    """Bytes of a computation without a graph, the most at once."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.no_grad(), LiveBytes() as live:
        function()
    return max(live.peak, torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0)


def rows_of(cond: Cond, groups: Tensor) -> Cond:
    """A condition's rows of these groups."""
    return {name: value[groups.to(value.device)] for name, value in cond.items()}
