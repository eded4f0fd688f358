"""A pipeline's call of its denoiser, taken apart so that it can be repeated for any branch."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from guidance.contract import Answers, Branch, Request
from guidance.evaluate import Counter, Inputs, each, evaluate
from solvers.families import Family


@dataclass
class Call:
    """One forward that a pipeline asked for, for the branches that it stacked along the batch."""

    family: Family
    branches: tuple[str, ...]
    network: nn.Module
    forward: Callable[..., Any]  # of the network, as the pipeline calls it
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    networks: Mapping[str, nn.Module]  # others that a method may name
    counter: Counter
    cond: Tensor | None = None  # the conditional answer (B, ...), once it was asked for in all rows

    def __post_init__(self):
        arguments = named(self.network, self.args, self.kwargs)
        self.rows, self.shared = sorted_out(arguments, self.family.batch_first)
        self.timestep = arguments["timestep"]

    @property
    def sample(self) -> Tensor:
        """What the network reads, of all branches."""
        return self.rows[self.family.batch_first[0]]

    def answer(self, request: Request, blank: Tensor) -> Answers:
        """The answers (B, ...), like `blank` where nothing is evaluated.

        Where they are exactly what the pipeline stacked, its very own call gives them, so that they are bit-equal.
        """
        if sorted(map(plain, request.values())) == sorted(self.branches):
            answers = self._stock(request)
        else:
            answers = evaluate(request, self._inputs, self._run, blank.to(self.sample.dtype), self.counter)
        self.cond = next((answers[name] for name, branch in request.items() if plain(branch) == "cond"), self.cond)
        return answers

    def _stock(self, request: Request) -> Answers:
        out = self.forward(*self.args, **self.kwargs)[0]
        self.counter.add(len(out))
        parts = dict(zip(self.branches, out.chunk(len(self.branches)), strict=True))
        return {name: parts[plain(branch)] for name, branch in request.items()}

    def _inputs(self, branch: Branch) -> Inputs:
        """The batch-first arguments (B, ...) of one branch."""
        position = self._position(branch.cond if isinstance(branch.cond, str) else "cond")
        inputs = each(lambda v: v.chunk(len(self.branches))[position], self.rows)
        return inputs if isinstance(branch.cond, str) else {**inputs, **self._override(branch.cond)}

    def _position(self, cond: str) -> int:
        if cond in self.branches:
            return self.branches.index(cond)
        if cond in self.family.order:
            raise ValueError(f"the method needs the branch {cond!r}: call the pipeline with guidance_scale > 1")
        raise ValueError(f"no condition {cond!r} in family {self.family.name}; known: {', '.join(self.family.order)}")

    def _override(self, cond: Mapping[str, Tensor]) -> Inputs:
        """A `Cond`, whose keys are the last parts of the dotted names, under those names."""
        places = {name.rpartition(".")[2]: name for name in self.family.batch_first}
        if unknown := sorted(cond.keys() - places.keys()):
            raise ValueError(f"the network takes no {', '.join(unknown)}; known: {', '.join(places)}")
        return {places[key]: value for key, value in cond.items()}

    def _run(self, network: str, patch: str | None, inputs: Inputs) -> Tensor:
        if network != "main" and network not in self.networks:
            raise ValueError(f"the method evaluates network {network!r}: pass networks={{{network!r}: ...}} to attach")
        forward, module = (self.forward, self.network) if network == "main" else (self.networks[network],) * 2
        with self._patched(module, patch):
            return forward(**nested({**self.shared, **inputs, "return_dict": False}))[0]

    def _patched(self, network: nn.Module, patch: str | None) -> AbstractContextManager[Any]:
        if patch is None:
            return nullcontext()
        known = self.family.patches
        if patch not in known:
            raise ValueError(f"family {self.family.name} has no patch {patch!r}; known: {', '.join(known) or 'none'}")
        return known[patch](network)


def plain(branch: Branch) -> str:
    """The condition's name, for a branch that is nothing but a named condition; "" for any other."""
    named = isinstance(branch.cond, str) and branch.rows is None and branch.patch is None and branch.network == "main"
    return str(branch.cond) if named else ""


def named(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    signature = inspect.signature(type(unwrap_module(network)).forward)
    _, *arguments = signature.bind(network, *args, **kwargs).arguments.items()
    return dict(arguments)


def sorted_out(arguments: Mapping[str, Any], batch_first: tuple[str, ...]) -> tuple[Inputs, Inputs]:
    """The arguments that have a row per sample, and the others, both under dotted names."""
    flat: Inputs = {}
    for name, value in arguments.items():
        inner = isinstance(value, Mapping) and any(known.startswith(f"{name}.") for known in batch_first)
        flat |= {f"{name}.{key}": part for key, part in value.items()} if inner else {name: value}
    rows = {name: value for name, value in flat.items() if name in batch_first and value is not None}
    return rows, {name: value for name, value in flat.items() if name not in rows}


def nested(flat: Inputs) -> Inputs:
    """Keyword arguments from dotted names."""
    arguments: Inputs = {}
    for name, value in flat.items():
        parent, _, key = name.rpartition(".")
        (arguments.setdefault(parent, {}) if parent else arguments)[key] = value
    return arguments
