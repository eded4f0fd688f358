"""The results of a noise optimisation: each iteration as it is made, and the best of all at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from difftune.errors import UserError
from difftune.files.checkpoint import State
from difftune.files.pictures import pil, save_pictures
from difftune.reno.objective import Iteration, Objective
from difftune.reno.progress import Progress
from rewards.monitor import Monitor, Parting
from solvers.memory.budget import Plan

START = "start"  # of a state's tensors, the noise that the run began with


class Live(NamedTuple):
    """An optimisation after an iteration; a sample that has left the batch is shown by its best."""

    iteration: int  # from 0
    images: Tensor  # (B, 3, H, W) in [0, 1], of this iteration
    noises: Tensor  # (B, C, h, w), which made them
    record: Iteration
    progress: Progress
    objective: Objective

    @property
    def best(self) -> "Result":
        """The result that `optimize` would return if it ended here."""
        return result(self.objective, self.progress)

    @property
    def state(self) -> State:
        """All that `optimize(..., state=...)` needs to go on from here, for `difftune.files.checkpoint.save`."""
        state, start = self.progress.state(), self.objective.unknowns.noise.cpu().clone()
        return state._replace(tensors={**state.tensors, START: start})


class Result(NamedTuple):
    """The best image of each sample by the total reward alone, regulariser aside, and how it was found."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    noises: Tensor  # (B, C, h, w), which make them
    rewards: Tensor  # (B,)
    images_before: Tensor
    noises_before: Tensor
    rewards_before: Tensor
    history: list[Iteration]
    plan: Plan  # how the engine ran
    prompts: list[str]
    seeds: list[int]
    reward_calls: Tensor  # (B,), images that were scored
    stopped: list[str]  # why a sample left the batch: "target", "patience", "not finite"; "" if it ran to the end
    embeddings: Tensor | None  # (B, L, E), of the prompts, if they were optimised

    def __repr__(self) -> str:
        before, after = self.rewards_before.tolist(), self.rewards.tolist()
        return (
            f"Result(rewards_before={before}, rewards={after}, images={tuple(self.images.shape)},"
            f" iterations={len(self.history)}; pil(), save(folder) and curve(name) have the rest)"
        )

    def pil(self) -> list[Image.Image]:
        """The images as pictures of PIL, one for each sample."""
        return pil(self.images)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the images to the folder as 000.png and so on, and return the files."""
        return save_pictures(folder, self.pil())

    def chosen(self) -> "Result":
        """The best sample of each prompt."""
        rows = [max(_where(self.prompts, prompt), key=lambda i: float(self.rewards[i])) for prompt in self._distinct()]
        return self.rows(rows)

    def rows(self, rows: list[int]) -> "Result":
        """Some of the samples, by their numbers."""
        return Result(*(_picked(value, rows) for value in self))

    def _distinct(self) -> list[str]:
        return list(dict.fromkeys(self.prompts))

    def curve(self, name: str, row: int | None = None) -> list[float]:
        """The curve of a number in `history`: a reward's name, or "total", "regularizer", "grad_norm", "held_out".

        Of one sample, until it left the batch; or the mean of all samples, each of which keeps its last value.
        """
        return curve(self.history, name, row)

    def parting(self, row: int | None = None, monitor: Monitor | None = None) -> Parting | None:
        """The iteration from which on the held-out reward fell while the optimised one rose; None if they did not part.

        Raises UserError if none was held out.
        """
        if self.history[0].held_out is None:
            raise UserError("no reward was held out: give ReNO held_out=")
        return (monitor or Monitor())(self.curve("total", row), self.curve("held_out", row))


def _where(values: Sequence[str], value: str) -> list[int]:
    return [i for i, v in enumerate(values) if v == value]


def _picked(value: Any, rows: list[int]) -> Any:
    """The rows of a field of Result."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, Iteration):
        return Iteration({n: v[rows] for n, v in value.parts.items()}, *(_picked(v, rows) for v in value[1:]))
    if isinstance(value, list) and value and isinstance(value[0], Iteration):
        return [_picked(record, rows) for record in value]
    return [value[i] for i in rows] if isinstance(value, list) else value


def curve(history: Sequence[Iteration], name: str, row: int | None = None) -> list[float]:
    """See `Result.curve`."""
    values = torch.stack([record.parts[name] if name in record.parts else record._asdict()[name] for record in history])
    if row is not None:
        return [v for v in values[:, row].double().tolist() if v == v]
    held = values.double().clone()
    for now, before in zip(held[1:], held[:-1], strict=True):
        now.copy_(torch.where(now.isnan(), before, now))
    return held.mean(dim=1).tolist()


def result(objective: Objective, progress: Progress) -> Result:
    """The result of a run at this progress."""
    every = torch.arange(len(progress.z), device=progress.z.device)
    (first, best, _), unknowns = progress.made, objective.unknowns
    return Result(
        best.images.clone(),
        unknowns.noise_of(best.z, every).clone(),
        best.total,
        first.images.clone(),
        unknowns.noise_of(first.z, every).clone(),
        first.total,
        list(progress.history),
        objective.plan,
        objective.prompts,
        list(progress.seeds),
        progress.calls.cpu(),
        list(progress.stopped),
        None if unknowns.of == "noise" else unknowns.embedding_of(best.z, every),
    )
