"""Where a noise optimisation stands: what it needs to go on, and what it would return. All of it is batch-first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from difftune.errors import UserError
from difftune.files.checkpoint import State
from difftune.reno.objective import Evaluated, Iteration
from difftune.reno.settings import NoiseSettings


class Made(NamedTuple):
    """An image of each sample, and what made it."""

    images: Tensor  # (B, 3, H, W)
    z: Tensor  # (B, D)
    total: Tensor  # (B,), on the CPU


@dataclass(frozen=True)
class Progress:
    """After `iteration` evaluations: what comes next, the first images, the best ones and the latest."""

    settings: NoiseSettings
    prompts: Sequence[str]
    seeds: Sequence[int]
    z: Tensor  # (B, D), evaluated next
    active: Tensor  # (B,) bool: samples still in the batch
    waited: Tensor  # (B,), iterations without a better image
    calls: Tensor  # (B,), images scored
    stopped: tuple[str, ...]  # why a sample left, "" where it has not
    iteration: int = 0
    pending: bool = False  # z was evaluated, and has not moved since
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # the optimiser's
    told: tuple[Tensor, ...] = ()  # (B, N) each: what searches were told
    history: tuple[Iteration, ...] = ()
    made: tuple[Made, ...] = ()  # first, best, now; empty before the first evaluation

    @property
    def first(self) -> Made:
        return self.made[0]

    @property
    def best(self) -> Made:
        return self.made[1]

    @property
    def now(self) -> Made:
        return self.made[2]

    @property
    def rows(self) -> Tensor:
        """Numbers of the active samples."""
        return self.active.nonzero().squeeze(1)

    def heard(self, row: int) -> list[Tensor]:
        """What the search of an active sample was told so far."""
        return [values[row] for values in self.told]

    def told_of(self, values: Tensor, rows: Tensor) -> "Progress":
        """With what the searches of the samples `rows` are told, (A, N)."""
        return replace(self, told=(*self.told, spread(values, rows, len(self.z))))

    def seen(self, found: Evaluated, z: Tensor, rows: Tensor, calls: Tensor) -> "Progress":
        """With one more evaluation, of z (A, D): the best kept, by reward alone, and the samples that are done gone."""
        if not self.made:
            first = Made(found.images, z, found.record.total)
            return replace(self, made=(first, first, first)).seen(found, z, rows, calls)
        finite = (found.record.total.isfinite() & found.record.grad_norm.isfinite()).to(rows.device)
        new = Made(found.images, z, found.record.total)
        gained = new.total > self.best.total[rows.cpu()]
        best = placed(self.best, picked(new, gained), rows[gained.to(rows.device)])
        now = placed(self.best, picked(new, finite.cpu()), rows[finite])
        waited = self.waited.index_add(0, rows, torch.ones_like(rows))
        waited[rows[gained.to(rows.device)]] = 0
        waited = waited if self.iteration else torch.zeros_like(waited)
        progress = replace(
            self,
            iteration=self.iteration + 1,
            calls=self.calls.index_add(0, rows, calls),
            waited=waited,
            made=(self.first, best, now),
            history=(*self.history, recorded(found.record, rows, len(self.z))),
        )
        return progress._without_the_done(rows[~finite].tolist())

    def _without_the_done(self, broken: list[int]) -> "Progress":
        """Each active sample that has reached the target, has waited long enough or is not finite leaves."""
        stopped, settings = list(self.stopped), self.settings
        for i in self.rows.tolist():
            if i in broken:
                stopped[i] = "not finite"
            elif settings.target is not None and self.best.total[i] >= settings.target:
                stopped[i] = "target"
            elif settings.patience is not None and self.waited[i] >= settings.patience:
                stopped[i] = "patience"
        active = torch.tensor([not why for why in stopped], device=self.active.device)
        return replace(self, stopped=tuple(stopped), active=active)

    def moved(self, z: Tensor, memory: Mapping[str, Tensor], rows: Tensor) -> "Progress":
        """With these samples' z and memory replaced."""
        kept = {key: self.memory[key].index_copy(0, rows, value) for key, value in memory.items()}
        return replace(self, z=self.z.index_copy(0, rows, z), memory=kept, pending=False)

    def state(self) -> State:
        """As tensors and JSON."""
        tensors = {"z": self.z, "active": self.active, "waited": self.waited, "calls": self.calls}
        tensors |= {f"memory.{key}": value for key, value in self.memory.items()}
        tensors |= {f"told.{i:06d}": values for i, values in enumerate(self.told)}
        for name, made in zip(("first", "best", "now"), self.made, strict=False):
            tensors |= {f"{name}.{key}": value for key, value in made._asdict().items()}
        tensors |= histories(self.history)
        about = {"prompts": list(self.prompts), "seeds": list(self.seeds), "stopped": list(self.stopped)}
        return State(self.iteration, _apart(tensors), {**about, "pending": self.pending})


def beginning(settings: NoiseSettings, z: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Progress:
    """Before the first evaluation."""
    zeros = torch.zeros(len(z), dtype=torch.long, device=z.device)
    return Progress(settings, prompts, seeds, z, zeros == 0, zeros, zeros, ("",) * len(z))


def of_state(
    state: State, settings: NoiseSettings, z: Tensor, prompts: Sequence[str], seeds: Sequence[int]
) -> Progress:
    """What `Progress.state` gave, for the same samples; z as it would begin. UserError where the samples differ."""
    for name, mine in (("prompts", list(prompts)), ("seeds", list(seeds))):
        if state.info[name] != mine:
            raise UserError(f"the state is of {name} {state.info[name]}, not of {mine}: resume with those")
    tensors = state.tensors
    if tensors["z"].shape != z.shape:
        raise UserError(
            f"the state is of {tuple(tensors['z'].shape)} unknowns, not of {tuple(z.shape)}: resume as it was"
        )

    def own(key: str) -> Tensor:
        return tensors[key].to(z.device)

    made = [
        Made(own(f"{n}.images"), own(f"{n}.z"), tensors[f"{n}.total"]) for n in ("first", "best", "now") if state.step
    ]
    return Progress(
        settings,
        prompts,
        seeds,
        own("z"),
        own("active"),
        own("waited"),
        own("calls"),
        tuple(state.info["stopped"]),
        state.step,
        state.info["pending"],
        {key.removeprefix("memory."): own(key) for key in tensors if key.startswith("memory.")},
        tuple(own(key) for key in sorted(tensors) if key.startswith("told.")),
        iterations(tensors, state.step),
        tuple(made),
    )


def histories(history: Sequence[Iteration]) -> dict[str, Tensor]:
    """A history's tensors (t, B), by name."""
    if not history:
        return {}
    first = history[0]
    found = {f"history.parts.{name}": torch.stack([r.parts[name] for r in history]) for name in first.parts}
    for name in ("total", "regularizer", "grad_norm", "held_out"):
        if first._asdict()[name] is not None:
            found[f"history.{name}"] = torch.stack([record._asdict()[name] for record in history])
    return found


def iterations(tensors: Mapping[str, Tensor], count: int) -> tuple[Iteration, ...]:
    """`histories` undone."""
    start = "history.parts."
    names = [key.removeprefix(start) for key in tensors if key.startswith(start)]
    rest = [tensors.get(f"history.{name}") for name in ("total", "regularizer", "grad_norm", "held_out")]
    return tuple(
        Iteration({n: tensors[start + n][i] for n in names}, *(None if t is None else t[i] for t in rest))  # type: ignore[arg-type]
        for i in range(count)
    )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No two share memory, which safetensors refuses."""
    return {key: value.detach().cpu().clone() for key, value in tensors.items()}


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
