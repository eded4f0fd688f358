"""Evaluating branches: one forward for all that share a network, a patch and a noise level, and NaN for the rows that
nobody asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor

from guidance.contract import Answers, Branch, Request
from solvers.noise import Noise, numbers

Inputs = dict[str, Any]  # name -> a tensor whose first dimension is the batch, or a list, tuple or mapping of such


@dataclass
class Counter:
    """Network evaluations: `rows`, one for each sample of each forward (NFE), and `calls`, the forwards."""

    rows: int = 0
    calls: int = 0
    branches: dict[str, int] = field(default_factory=dict)  # the rows, by the names that the method gives its branches

    def add(self, branches: Mapping[str, int], wanted: Sequence[Tensor | None] = ()) -> None:
        """One forward of that many rows of each branch; `wanted` are the `Branch.rows` of those that share it."""
        self.rows += sum(branches.values())
        self.calls += 1
        for name, rows in branches.items():
            self.branches[name] = self.branches.get(name, 0) + rows


def evaluate(
    request: Request,
    inputs: Callable[[Branch], Inputs],
    call: Callable[[Branch, Inputs], Tensor],
    blank: Tensor,
    counter: Counter,
) -> Answers:
    """The answers to `request`, each (B, ...) like `blank`.

    `inputs(branch)` is what the network is given for all B samples; `call(branch, inputs)` is its raw output for the
    rows of one or several branches that share the network, the patch and the level of `branch`.
    """
    jobs = {name: _chosen(inputs(branch), branch.rows) for name, branch in request.items() if wanted(branch)}
    answers = {name: torch.full_like(blank, torch.nan) for name in request.keys() - jobs.keys()}
    for names in _groups(request, jobs):
        out = call(request[names[0]], _joined([jobs[name] for name in names]))
        sizes = {name: _size(request[name], blank) for name in names}
        counter.add(sizes, [request[name].rows for name in names])
        parts = out.split(list(sizes.values()))
        answers |= {n: _spread(part, request[n].rows) for n, part in zip(names, parts, strict=True)}
    return {name: answers[name] for name in request}


def each(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    """f of every tensor that has a batch, in nested mappings, lists and tuples; anything else stays."""
    if isinstance(value, Tensor):
        return f(value) if value.ndim else value
    if isinstance(value, Mapping):
        return {name: each(f, part) for name, part in value.items()}
    return type(value)(each(f, part) for part in value) if isinstance(value, (list, tuple)) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def wanted(branch: Branch) -> bool:
    """Whether any sample needs it."""
    return branch.rows is None or bool(branch.rows.any())


def _size(branch: Branch, blank: Tensor) -> int:
    return len(blank) if branch.rows is None else int(branch.rows.sum())


def _chosen(inputs: Inputs, rows: Tensor | None) -> Inputs:
    if rows is None:
        return inputs
    index = rows.nonzero()[:, 0]
    return each(lambda v: v[index.to(v.device)], inputs)


def _spread(part: Tensor, rows: Tensor | None) -> Tensor:
    """`part` in its rows of a batch of NaN."""
    if rows is None:
        return part
    return part.new_full((len(rows), *part.shape[1:]), torch.nan).index_put((rows.to(part.device),), part)


def _groups(request: Request, jobs: Mapping[str, Inputs]) -> Iterable[list[str]]:
    """The branches that can share a forward: same network, patch and level, inputs of the same names and shapes."""
    groups: dict[Any, list[str]] = {}
    for name, inputs in jobs.items():
        branch = request[name]
        key = (branch.network, branch.patch, _level(branch.at), str(_shapes(inputs)))
        groups.setdefault(key, []).append(name)
    return groups.values()


def _level(at: Noise | None) -> Any:
    """What tells levels apart: their numbers, or for one that differs by sample the object itself."""
    return None if at is None else numbers(at) or id(at.sigma)


def _shapes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _shapes(value[name]) for name in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_shapes(part) for part in value]
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else None


def _joined(jobs: list[Inputs]) -> Inputs:
    return jobs[0] if len(jobs) == 1 else _cat(jobs)


def _cat(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values) if values[0].ndim else values[0]
    if isinstance(values[0], Mapping):
        return {name: _cat([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], (list, tuple)):
        return type(values[0])(_cat(list(parts)) for parts in zip(*values, strict=True))
    return values[0]
