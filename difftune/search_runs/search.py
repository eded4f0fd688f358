"""Search at inference on a diffusers pipeline: particles and trees that raise a reward, weights and network untouched.

    from difftune import search

    best = search(pipe, prompts, method="dts-star", reward={"tiny-clip": 1.0}, nfe_budget=800, seed=0).run()
    best.save("out")            # best.pil() gives pictures, best.images a tensor (P, 3, H, W) in [0, 1]
    best.rewards, best.nfe, best.reward_calls
    best.curve()                # (NFE, reward calls, best reward) on the way

    for live in search(pipe, prompts, method="fk", reward={"tiny-clip": 1.0}, nfe_budget=800):
        ...                     # `live` has the same; stop whenever it is good enough

What is searched is the law of the pipeline's own sampler with eta = 1 (flow models: its stochastic conversion), with
any guidance inside. `guidance.search.catalogue.SEARCHES` has the methods, and each one's settings.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from difftune.errors import RunError, UserError
from difftune.files.pictures import pil, save_pictures
from difftune.lookup import at_least, known, reward_named
from difftune.pipelines.engine import frozen
from difftune.pipelines.method_parts import prepared
from difftune.pipelines.shared import done_by_all, told_by_each
from difftune.processes import process
from difftune.search_runs.experts import Experts, experts_for
from difftune.search_runs.held import rows_within
from difftune.search_runs.problem import Adapter
from guidance.contract import Guidance
from guidance.methods.cfg import CFG
from guidance.search.catalogue import SEARCHES
from guidance.search.problem import Problem, Saved, State
from rewards.registry import Reward
from solvers.latent import LatentModel

GRADIENTS = {"tds"}  # methods that differentiate the reward


class Point(NamedTuple):
    """One point of a search's curve, `history[i]`: what was spent and found until then, a number for each prompt."""

    nfe: list[int]  # network evaluations; a step under CFG has two
    reward_calls: list[int]
    reward: list[float]  # the best so far; -inf before a sample is finished


@dataclass(frozen=True)
class Found:
    """The results of a search so far, a row for each prompt; `history` is its curve up to here."""

    state: State
    history: tuple[Point, ...]
    decode: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        rewards, nfe, calls = (values.tolist() for values in (self.rewards, self.nfe, self.reward_calls))
        return (
            f"Found(rewards={rewards}, nfe={nfe}, reward_calls={calls}; pil(), save(folder) and curve() have the rest)"
        )

    @cached_property
    def images(self) -> Tensor:
        """(P, 3, H, W) in [0, 1], on the CPU: the best finished sample of each prompt; NaN before there is one."""
        return decode_each(self.decode, self.state.x0)

    def pil(self) -> list[Image.Image]:
        """The images as pictures of PIL, one for each prompt. Raises RunError before there is one."""
        if self.images.isnan().any():
            raise RunError("no sample is finished yet: go on with the search, or raise its budget")
        return pil(self.images)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the images to the folder as 000.png and so on, and return the files."""
        return save_pictures(folder, self.pil())

    def curve(self, prompt: int | None = None) -> list[tuple[float, float, float]]:
        """(network evaluations, reward calls, best reward) at each point of `history`: of one prompt, by its number, or
        the means of all; from where each has a finished sample."""
        rows = range(len(self.state.reward)) if prompt is None else [prompt]
        means = [tuple(fmean(values[i] for i in rows) for values in point) for point in self.history]
        return [(nfe, calls, reward) for nfe, calls, reward in means if reward > -math.inf]

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
def decode_each(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Images on the CPU, one at a time: a decoder's activations are the largest there are."""
    return torch.cat([decode(latent[None]).float().cpu() for latent in latents])


@dataclass
class Search:
    """A search that is run to its end by `run`, or step by step as it is iterated; `problem` counts what was spent."""

    problem: Problem
    method: str
    states: Iterator[State]
    model: LatentModel
    progress: bool = True
    history: tuple[Point, ...] = ()
    others: tuple[Any, ...] = ()  # the pipelines of experts
    _last: Found | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Found]:
        """The best so far after each step of the method."""
        yield from self._steps

    def run(self) -> Found:
        """Run to the end of the search, from wherever it stands. Raises RunError if nothing was found."""
        for _ in self:
            pass
        if self._last is None:
            raise RunError(f"{self.method} found nothing within its budget: raise the budget")
        return self._last

    @property
    def pipe(self) -> Any:
        """The pipeline that is searched."""
        return self.model.pipe

    @cached_property
    def _steps(self) -> Iterator[Found]:
        return self._followed()

    def _followed(self) -> Iterator[Found]:
        with tqdm(total=self._total(), desc=self.method, unit="NFE", disable=None if self.progress else True) as bar:
            for state in self._unwatched():
                self.history = append_point(self.history, state)
                self._last = Found(state, self.history, self.model.decode)
                bar.set_postfix(standing(state), refresh=False)
                bar.update(int(state.nfe.sum()) - bar.n)
                yield self._last

    def _total(self) -> int | None:
        return None if self.problem.nfe_budget is None else self.problem.nfe_budget * len(self.problem.seeds)

    def _unwatched(self) -> Iterator[State]:
        """The states; while a step runs, and only then, no parameter asks for a gradient."""
        while True:
            with frozen(self.pipe, *self.others):
                state = next(self.states, None)
            if state is None:
                return
            yield state


def standing(state: State) -> dict[str, str]:
    """The text of a progress bar beside the NFEs: the mean over prompts of the best reward so far, and all calls."""
    best = float(state.reward.mean())
    said = {"best reward": f"{best:.4f}"} if best > -torch.inf else {}
    return {**said, "reward calls": str(int(state.reward_calls.sum()))}


def append_point(history: tuple[Point, ...], state: State) -> tuple[Point, ...]:
    """The curve with another point; of a flat stretch, the ends alone, and a point that is there already once."""
    point = Point(state.nfe.tolist(), state.reward_calls.tolist(), state.reward.tolist())
    if history and history[-1] == point:  # a search that is resumed at its end says it again
        return history
    flat = len(history) > 1 and history[-1].reward == history[-2].reward == point.reward
    return (*(history[:-1] if flat else history), point)


def search(
    pipe: Any,
    prompts: str | Sequence[str],
    method: str = "dts-star",
    reward: Mapping[str, float] | Reward | None = None,
    nfe_budget: int | None = 800,
    seed: int = 0,
    *,
    guidance: Guidance | None = None,
    experts: Experts | None = None,
    num_inference_steps: int = 25,
    eta: float = 1.0,
    embedded_guidance: float | None = None,
    reward_budget: int | None = None,
    memory_budget: str | None = None,
    decode_batch: int = 1,
    enable_vae_tiling: bool = False,
    micro_batch: int | None = None,
    negative_prompts: str | Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
    saved: Saved | None = None,
    shared: bool = False,
    **settings: Any,
) -> Search:
    """A search for images of high reward, one for each prompt: to be `run`, or to be iterated.

    method: of `SEARCHES`; `settings` are its config's. reward: weights by name ({"tiny-clip": 1.0}, the default), or a
    reward. nfe_budget, reward_budget: network evaluations and reward calls of each prompt, never exceeded; None is no
    limit. seed: the i-th prompt's randomness is that of seed + i, whichever run beside it. guidance: inside the search;
    CFG() by default. experts: of fkc, beside "cond" and "uncond": prompts, or an `Expert` with a pipeline of its own,
    by the names that `exponents` has. eta: 1 is DDPM; 0, DDIM, is for best-of-n and importance alone.
    embedded_guidance: the scale told to a network distilled over scales (FLUX.1-dev, LCM). memory_budget
    ("6GiB", weights included): one row is measured, and as many are run at a time as fit beside the samples that the
    budgets pay for; micro_batch sets them by hand. decode_batch, enable_vae_tiling: images that are decoded at a time,
    and whether a large one is in tiles. saved: what a state's `saved()` gave, to go on from; the budgets may
    have grown. shared: the processes that were launched together run this very search, each with a part of every batch.
    Raises UserError, before anything runs, for an unknown name or an invalid setting.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise UserError("the list of prompts is empty: give at least one")
    config = method_config(method, settings)
    named = experts_for(method, config, experts)
    reward = reward_named({"tiny-clip": 1.0} if reward is None else reward, gradient=method in GRADIENTS)
    at_least(1, num_inference_steps=num_inference_steps, nfe_budget=nfe_budget or 1, reward_budget=reward_budget or 1)
    model = LatentModel(pipe, embedded_guidance, decode_batch, enable_vae_tiling)
    adapter = Adapter(model, prompts, reward, height, width)
    levels = adapter.model.levels(num_inference_steps, height, width)
    guidance = prepared(pipe, guidance or CFG(), prompts, num_inference_steps)
    adapter = adapter.with_experts(named, levels)
    problem = adapter.problem(levels, guidance, negative_prompts, seed, eta)
    if eta == 0 and method not in ("best-of-n", "importance"):
        problem.needs_noise(method)
    problem.nfe_budget, problem.reward_budget = nfe_budget, reward_budget
    problem.micro_batch = micro_batch
    if shared:
        problem.workers, problem.do = process().num_processes, done_by_all
    if micro_batch is None and memory_budget is not None:
        rows = partial(rows_within, memory_budget, adapter, problem, config, method in GRADIENTS)
        problem.micro_batch = min(told_by_each(rows)) if shared else rows()  # the same parts in every process
    states = SEARCHES[method].search(problem, config, saved)
    others = tuple(model.pipe for model in adapter.other_models)
    return Search(problem, method, states, model, progress, others=others)


def method_config(method: str, settings: Mapping[str, Any]) -> Any:
    """The settings of a method. Raises UserError for an unknown name or an invalid setting."""
    make = SEARCHES[known("search method", method, SEARCHES)].config
    for name in settings:
        if name == "steps":
            raise UserError("search has no setting 'steps': the steps of the sampler are num_inference_steps")
        known(f"setting of {method}", name, make.__dataclass_fields__)
    return make(**settings)
