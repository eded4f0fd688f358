"""The memory of a search on the device: the rows that fit into a memory budget, beside the samples that it keeps."""

from bisect import bisect_right
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difftune.errors import UserError
from difftune.pipelines.engine import frozen, held
from difftune.search_runs.problem import Adapter
from guidance.search.dts import DTS, shaped
from guidance.search.fkc import FKC
from guidance.search.population import size_for
from guidance.search.problem import Problem, estimate
from guidance.search.selection import SVDD, Beam
from solvers.denoiser import Path, Prediction
from solvers.memory.budget import caution_on_cpu, parse_size, size_text
from solvers.memory.live import Footprint, Function, LiveBytes, measured


def rows_within(memory_budget: str, adapter: Adapter, problem: Problem, config: Any, gradient: bool) -> int:
    """The rows at a time whose predicted peak stays within the budget ("6GiB", the weights included).

    One row is measured; gradient: with its backward pass. Raises UserError if not even one row fits.
    """
    caution_on_cpu()
    limit = parse_size(memory_budget)
    said, row = measure_row(adapter, problem, gradient)
    base = held(adapter.model, 0, *adapter.other_models) + kept(problem, config, said, gradient)
    peak = partial(row.peak, decode_batch=adapter.model.decode_batch)
    if base + peak(1) > limit:
        enough = size_text(base + peak(1))
        raise UserError(
            f"memory_budget {memory_budget} is too small: one row at a time takes {enough}, with the model and the "
            f"{paid(problem, config)} samples that the budgets pay for"
        )
    return bisect_right(range(1, MOST_ROWS + 1), limit - base, key=peak)


MOST_ROWS = 2**20


class Row(NamedTuple):
    """The bytes of one row in each part of a step."""

    network: Footprint
    decode: Footprint
    reward: Footprint

    def peak(self, rows: int, decode_batch: int) -> int:
        """The most bytes of so many rows at once: all of them in the network and in the reward, and `decode_batch` in
        the decoder, whose images are kept, joined, and with a backward pass have a gradient."""
        work = self.network.peak - self.network.kept
        decode = min(rows, decode_batch) * self.decode.peak
        return rows * (self.network.kept + 3 * self.decode.kept) + max(rows * work, decode, rows * self.reward.peak)


def measure_row(adapter: Adapter, problem: Problem, gradient: bool) -> tuple[Prediction, Row]:
    """The prediction of the last step for one row, and what its computation takes."""
    group, i = torch.zeros(1, dtype=torch.int64), problem.steps - 1
    x, said, measure = problem.start(0, -1).x, list[Prediction](), measured if gradient else forward
    model = adapter.model

    def network(x: Tensor) -> list[Tensor]:
        for name in adapter.others:
            problem.experts[name](group)(Path(x), problem.levels[i])
        said[:] = [problem.predict(group)(Path(x), problem.levels[i])]
        return [estimate(said[0])]

    with frozen(model.pipe, *(other.pipe for other in adapter.other_models)):
        called = measure(network, x)
        latent = estimate(said[0]).detach()
        decoded = measure(lambda x: [model.decode(x, checkpointed=gradient)], latent)
        with torch.no_grad():
            images = model.decode(latent)
        judged = measure(lambda images: [adapter.reward(images, adapter.texts(group))], images)
    return said[0], Row(called, decoded, judged)


def alive(problem: Problem, config: Any) -> int:
    """The samples, of all prompts, that are on their way at once, at most."""
    if isinstance(config, DTS):
        return len(problem.seeds) * config.parallel
    each = config.candidates if isinstance(config, SVDD | Beam) else 1
    return len(problem.seeds) * each * size_for(problem, config.particles, each * problem.cost(), each)


def paid(problem: Problem, config: Any) -> int:
    """The samples, of all prompts, that the budgets pay for; without a budget, those of one run."""
    if problem.nfe_budget is problem.reward_budget is None:
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
    branches = shaped(problem, config).branches or 0
    nodes = paid(problem, config) * (branches + 1) if torch.device(problem.device).type == "cpu" else 0
    return going + nodes * (latent + memory)


def forward(function: Function, x: Tensor) -> Footprint:
    """The memory of a computation without a graph: what its outputs take, and the most at once."""
    if on_gpu := torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.no_grad(), LiveBytes() as live:
        outputs = function(x)
        kept = live.now
    del outputs
    return Footprint(kept, max(live.peak, torch.cuda.max_memory_allocated() - before if on_gpu else 0))
