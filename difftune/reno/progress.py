"""The progress of a noise optimisation: what it needs to go on, and what it would return, batch-first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from difftune.errors import UserError
from difftune.files.checkpoint import State
from difftune.reno.objective import Evaluated, Iteration
from difftune.reno.settings import NoiseSettings
from guidance.codec import apart, decode, encode


class Made(NamedTuple):
    """An image of each sample, and what made it."""

    images: Tensor  # (B, 3, H, W)
    z: Tensor  # (B, D)
    total: Tensor  # (B,), on the CPU


class Moments(NamedTuple):
    """The images of three evaluations: the first, the best of each sample so far, and the latest."""

    first: Made
    best: Made
    now: Made


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The part of a `Progress` that is written as it is."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    z: Tensor  # (B, D), evaluated next
    active: Tensor  # (B,) bool: samples still in the batch
    waited: Tensor  # (B,), iterations without a better image
    calls: Tensor  # (B,), images scored
    stopped: tuple[str, ...]  # why a sample left, "" if it has not
    pending: bool = False  # z was evaluated, and has not moved since
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # the optimiser's
    told: tuple[Tensor, ...] = ()  # (B, N) each: what searches were told


@dataclass(frozen=True, kw_only=True)
class Progress(Standing):
    """After `iteration` evaluations: what comes next, the first images, the best ones and the latest."""

    settings: NoiseSettings
    iteration: int = 0
    history: tuple[Iteration, ...] = ()
    moments: Moments | None = None  # None before the first evaluation

    @property
    def made(self) -> Moments:
        assert self.moments is not None, "nothing was evaluated yet"
        return self.moments

    @property
    def rows(self) -> Tensor:
        """Numbers of the active samples."""
        return self.active.nonzero().squeeze(1)

    def heard(self, row: int) -> list[Tensor]:
        """The values that the search of an active sample was sent so far."""
        return [values[row] for values in self.told]

    def told_of(self, values: Tensor, rows: Tensor) -> "Progress":
        """The progress after the searches of the samples `rows` are sent these values (A, N)."""
        return replace(self, told=(*self.told, spread(values, rows, len(self.z))))

    def seen(self, found: Evaluated, z: Tensor, rows: Tensor, calls: Tensor) -> "Progress":
        """The progress after an evaluation of z (A, D): the best by reward is kept, and samples that are done leave."""
        if self.moments is None:
            first = Made(found.images, z, found.record.total)
            return replace(self, moments=Moments(first, first, first)).seen(found, z, rows, calls)
        finite = (found.record.total.isfinite() & found.record.grad_norm.isfinite()).to(rows.device)
        new = Made(found.images, z, found.record.total)
        gained = new.total > self.made.best.total[rows.cpu()]
        best = placed(self.made.best, picked(new, gained), rows[gained.to(rows.device)])
        now = placed(self.made.best, picked(new, finite.cpu()), rows[finite])
        waited = self.waited.index_add(0, rows, torch.ones_like(rows))
        waited[rows[gained.to(rows.device)]] = 0
        waited = waited if self.iteration else torch.zeros_like(waited)
        progress = replace(
            self,
            iteration=self.iteration + 1,
            calls=self.calls.index_add(0, rows, calls),
            waited=waited,
            moments=Moments(self.made.first, best, now),
            history=(*self.history, recorded(found.record, rows, len(self.z))),
        )
        return progress._without_the_done(rows[~finite].tolist())

    def _without_the_done(self, broken: list[int]) -> "Progress":
        """Each active sample that has reached the target, has waited long enough or is not finite leaves."""
        stopped, settings = list(self.stopped), self.settings
        for i in self.rows.tolist():
            if i in broken:
                stopped[i] = "not finite"
            elif settings.target is not None and self.made.best.total[i] >= settings.target:
                stopped[i] = "target"
            elif settings.patience is not None and self.waited[i] >= settings.patience:
                stopped[i] = "patience"
        active = torch.tensor([not why for why in stopped], device=self.active.device)
        return replace(self, stopped=tuple(stopped), active=active)

    def moved(self, z: Tensor, memory: Mapping[str, Tensor], rows: Tensor) -> "Progress":
        """The progress with the z and the memory of these samples replaced."""
        kept = {key: self.memory[key].index_copy(0, rows, value) for key, value in memory.items()}
        return replace(self, z=self.z.index_copy(0, rows, z), memory=kept, pending=False)

    def state(self) -> State:
        """The progress as tensors and JSON."""
        standing = {one.name: getattr(self, one.name) for one in fields(Standing)}
        made = {} if self.moments is None else self.moments._asdict()
        tensors, info = encode({**standing, **made, "history": stacked(self.history)})
        return State(self.iteration, apart(tensors), info)


def beginning(settings: NoiseSettings, z: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Progress:
    """Before the first evaluation."""
    zeros = torch.zeros(len(z), dtype=torch.long, device=z.device)
    return Progress(
        settings=settings,
        prompts=prompts,
        seeds=seeds,
        z=z,
        active=zeros == 0,
        waited=zeros,
        calls=zeros,
        stopped=("",) * len(z),
    )


def of_state(
    state: State, settings: NoiseSettings, z: Tensor, prompts: Sequence[str], seeds: Sequence[int]
) -> Progress:
    """The progress that `Progress.state` gave; z as it would begin. UserError if the samples are not the same."""
    for name, mine in (("prompts", list(prompts)), ("seeds", list(seeds))):
        if state.info[name] != mine:
            raise UserError(f"the state is of {name} {state.info[name]}, not of {mine}: resume with those")
    if (before := state.tensors["z"].shape) != z.shape:
        raise UserError(f"the state is of {tuple(before)} unknowns, not of {tuple(z.shape)}: resume as it was")
    on_cpu = {name: tensor for name, tensor in state.tensors.items() if name.endswith(".total")}
    placed = {name: tensor.to(z.device) for name, tensor in state.tensors.items()} | on_cpu
    progress = Progress(**vars(decode(Standing, placed, state.info)), settings=settings, iteration=state.step)
    moments = decode(Moments, placed) if state.step else None
    return replace(progress, history=unstacked(state.tensors), moments=moments)


def stacked(history: Sequence[Iteration]) -> dict[str, Tensor]:
    """The numbers (t, B) of a history, by their names in an iteration."""
    records = [encode(record).tensors for record in history]
    return {name: torch.stack([record[name] for record in records]) for name in (records[0] if records else ())}


def unstacked(tensors: Mapping[str, Tensor]) -> tuple[Iteration, ...]:
    """The history whose `stacked` numbers are written under "history"."""
    curves = {name.removeprefix("history."): curve for name, curve in tensors.items() if name.startswith("history.")}
    rows = zip(*curves.values(), strict=True)
    return tuple(decode(Iteration, dict(zip(curves, row, strict=True))) for row in rows)


def spread(values: Tensor, rows: Tensor, every: int) -> Tensor:
    """values (A, ...) at the samples `rows`, NaN at all others."""
    blank = values.new_full((every, *values.shape[1:]), torch.nan)
    return blank.index_copy(0, rows.to(values.device), values)


def recorded(record: Iteration, rows: Tensor, every: int) -> Iteration:
    """A record of the samples `rows` as one of all."""
    parts = {name: spread(scores, rows, every) for name, scores in record.parts.items()}
    return Iteration(parts, *(None if value is None else spread(value, rows, every) for value in record[1:]))  # type: ignore[arg-type]


def picked(made: Made, index: Tensor) -> Made:
    return Made(*(value[index.to(value.device)] for value in made))


def placed(old: Made, new: Made, rows: Tensor) -> Made:
    """`old` with `new` at the samples `rows`: new tensors, which alias nothing."""
    return Made(*(o.index_copy(0, rows.to(o.device), n.to(o)) for o, n in zip(old, new, strict=True)))


def chosen(found: Evaluated, index: Tensor) -> Evaluated:
    """Some rows of what was evaluated."""
    at = index.cpu()
    parts = {name: scores[at] for name, scores in found.record.parts.items()}
    record = Iteration(parts, *(None if value is None else value[at] for value in found.record[1:]))  # type: ignore[arg-type]
    gradient = None if found.gradient is None else found.gradient[index]
    return Evaluated(found.images[index], record, found.loss[index], gradient)
