"""Optimal checkpointing over sampler steps: the exact gradient with a bounded number of stored states.

Revolve (Griewank and Walther, https://doi.org/10.1145/347837.347846): with c stored states, the initial one among them,
and r the integer with C(c + r - 1, c) < l <= C(c + r, c), reversing a chain of l steps takes at least

    T(l, c) = r l - C(c + r, c + 1)

steps that are run again without a graph, besides the l steps that are run with one.
"""

from dataclasses import dataclass
from functools import cache
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Path, Shape, pack, unpack
from solvers.errors import UserError
from solvers.rollout.recompute import NoGenerator
from solvers.rollout.run import Run, check_listed, observe, step_of
from solvers.rollout.sweep import Down, Gradients, RandomState, Totals, replaying, swept, vjp


def repeated(steps: int, slots: int) -> int:
    """T(steps, slots): how many steps are run without a graph to reverse all of them."""
    if steps <= 1:
        return 0
    r = 0
    while comb(slots + r, slots) < steps:
        r += 1
    return r * steps - comb(slots + r, slots + 1)


def milestones(steps: int, slots: int) -> list[int]:
    """The steps whose starting states are stored on the way down a chain: 0, and slots - 1 more at most."""
    stored = [0]
    while slots > 1 and stored[-1] < steps - 1:
        stored.append(stored[-1] + _split(steps - stored[-1], slots))
        slots -= 1
    return stored


@cache
def _split(steps: int, slots: int) -> int:
    """m that minimises m + T(steps - m, slots - 1) + T(m, slots)."""
    return min(range(1, steps), key=lambda m: m + repeated(steps - m, slots - 1) + repeated(m, slots))


def revolve(run: Run, option: str) -> Path:
    """The exact gradient with `slots` stored states besides the current one (https://doi.org/10.1145/347837.347846).

    Makes T(N, slots) + N + 1 network calls if a step makes one. That is one more than the minimum: the last step is run
    once without a graph, to know the loss. Its starting state is kept as the current one until then.
    """
    if not option.isdecimal() or int(option) < 1:
        raise UserError(f"'revolve:{option}' wants the number of states to store, 1 or more, as in 'revolve:8'")
    step_of(run)
    return replayed(run, int(option))


def replayed(run: Run, slots: int) -> Path:
    """The end of the run; its gradient is computed by a sweep with `slots` stored states."""
    ends, note = swept(run, Replay(run, slots))
    return unpack(ends, note.end)


States = list[tuple[int, Path]]  # steps, and the paths that they start from


class Note(NamedTuple):
    """The record of a run beside its start."""

    states: States  # each is dropped after its use: a second backward pass starts again from x
    random: dict[int, RandomState]  # of each step that drew random numbers (dropout): the generators before it
    end: Shape


@dataclass(frozen=True)
class Replay:
    """A run of any step, and its exact gradient."""

    run: Run
    slots: int

    def down(self, x: Tensor, check: bool) -> Down:
        n, path = len(self.run.legs), Path(x)
        stored, states, random = {*milestones(n, self.slots), n - 1}, list[tuple[int, Path]](), {}
        for i in range(n):
            if i in stored:
                states.append((i, path))
            before = RandomState.now(x.device)
            path = self._first(path) if check and i == 0 else self._step(path, i)
            if before != RandomState.now(x.device):
                random[i] = before
        ends, shape = pack(path)
        return Down(ends, [x], Note(states, random, shape))

    def up(self, down: Down, cotangents: Gradients, totals: Totals) -> Tensor | None:
        end, note = len(self.run.legs), down.note
        stack = note.states[:] or [(0, Path(down.kept[0]))]
        note.states.clear()
        while end:
            start, path = stack[-1]
            for mark in milestones(end - start, self.slots - len(stack) + 1)[1:]:
                path = self._again(path, stack[-1][0], start + mark, note)
                stack.append((start + mark, path))
            path, end = self._again(path, stack[-1][0], end - 1, note), end - 1
            cotangents = self._pull(path, end, cotangents, totals, note)
            if stack[-1][0] == end:
                stack.pop()
        return cotangents[0]

    def _step(self, path: Path, i: int) -> Path:
        now, then, noise = self.run.legs[i]
        return step_of(self.run)(self.run.predict, path, now, then, noise)

    def _first(self, path: Path) -> Path:
        """The first step, under a graph, which tells whether `predict.tensors` is complete."""
        with torch.enable_grad():
            with NoGenerator():
                tensors, shape = pack(self._step(path, 0))
            check_listed(self.run, tensors)
        return unpack([t.detach() for t in tensors], shape)

    def _again(self, path: Path, start: int, stop: int, note: Note) -> Path:
        for i in range(start, stop):
            with replaying(note.random.get(i)):
                path = self._step(path, i)
        return path

    def _pull(self, path: Path, i: int, cotangents: Gradients, totals: Totals, note: Note) -> Gradients:
        """The gradient at step i's start from that at its end."""
        inputs, shape = pack(path)
        with replaying(note.random.get(i)):
            _, found, own = vjp(lambda *t: pack(self._step(unpack(t, shape), i))[0], inputs, totals.tensors, cotangents)
        totals.add(own)
        observe(self.run, i, found[0])
        return found
