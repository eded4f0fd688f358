"""The calls of its denoiser that a pipeline makes in one step, taken apart so that any branch can be evaluated."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn
from torch.nn import functional as F

from guidance.branches import Counter, Inputs, each, evaluate, wanted
from guidance.contract import Answers, Branch, Request
from solvers.errors import UserError
from solvers.families.family import Family
from solvers.families.tokens import packed, unpacked
from solvers.families.unet import CONTROLNET_INPUTS
from solvers.noise import Noise, numbers

TIME = "timestep"  # the argument that tells a network the time
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")  # of a ControlNet, for a UNet


@dataclass(frozen=True)
class Call:
    """One forward as a pipeline asked for it: its arguments with a row per sample, and the others, by dotted names."""

    network: nn.Module
    forward: Callable[..., Any]  # of the network, as the pipeline calls it
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: Inputs
    shared: Inputs
    sample: Tensor  # what the network reads, of all branches in it

    def __len__(self) -> int:
        return len(self.sample)

    def repeated(self, **changed: Any) -> Any:
        """The result of the pipeline's own call, with some keyword arguments changed."""
        return self.forward(*self.args, **{**self.kwargs, **changed})


def recorded(
    network: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    batch_first: Sequence[str],
    gathered: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> Call:
    """A call, whose arguments may change later: the pipelines reuse dictionaries. `gathered`: the family's."""
    rows, shared = sorted_out(gathered(named(network, args, kwargs)), batch_first)
    return Call(network, forward, args, kwargs, rows, shared, rows[batch_first[0]])


@dataclass
class Asked:
    """The calls of one step: one for the branches stacked along its batch, or one for each branch in turn."""

    family: Family
    branches: tuple[str, ...]  # that the pipeline prepared
    calls: Sequence[Call]
    control: Call | None  # of the ControlNet, whose answer the calls are given
    x: Tensor  # (B, C, ...), and every answer is like it
    at: Noise  # of x
    clock: Callable[[Noise], Tensor]  # the scheduler's timestep at a level
    networks: Mapping[str, nn.Module]  # others that a method may name
    counter: Counter
    method: str  # its name, for a sentence
    cond: Tensor | None = None  # the conditional answer, once it was asked for in all rows
    guided: bool = False  # whether anything else was asked for
    idle: bool = True  # whether nothing was evaluated yet, as in a step that stays where it is

    def answer(self, request: Request) -> Answers:
        """The answers (B, C, ...), NaN if nothing is evaluated.

        Where they are exactly what the pipeline stacked, its very own call gives them, so that they are bit-equal.
        """
        places = {name: self._place(branch) for name, branch in request.items()}
        if self.family.batched and sorted(map(plain, request.values())) == sorted(self.branches):
            answers = self._stock(request)
        elif self.family.batched:
            answers = self._evaluated(request, self.calls[0])
        else:  # never stacked, which would take more memory than the pipeline does
            answers = {}
            for name, branch in request.items():
                answers |= self._evaluated({name: branch}, places[name][0])
        self.cond = next((answers[name] for name, branch in request.items() if plain(branch) == "cond"), self.cond)
        self.guided |= any(plain(branch) != "cond" for branch in request.values())
        self.idle &= not any(map(wanted, request.values()))
        return answers

    def _stock(self, request: Request) -> Answers:
        residuals = {} if self.control is None else dict(zip(RESIDUALS, self._stock_residuals(), strict=True))
        out = self.calls[0].repeated(**residuals)[0]
        self.counter.add(dict.fromkeys(request, len(out) // len(self.branches)))
        parts = dict(zip(self.branches, self._predicted(out).chunk(len(self.branches)), strict=True))
        return {name: parts[plain(branch)] for name, branch in request.items()}

    def _stock_residuals(self) -> tuple[Any, Any]:
        """The residuals of all branches; in guess mode only the conditional one has them, the others' are zero."""
        assert self.control is not None
        down, mid = self.control.repeated()
        if self._guessing:
            down, mid = each(lambda d: torch.cat([torch.zeros_like(d), d]), (list(down), mid))
        return down, mid

    @property
    def _guessing(self) -> bool:
        return self.control is not None and len(self.control) < len(self.calls[0])

    def _evaluated(self, request: Request, call: Call) -> Answers:
        blank = self._predicted(self.x.to(call.sample.dtype), read=False)
        return evaluate(request, self._inputs, partial(self._run, call), blank, self.counter)

    def _predicted(self, out: Any, read: bool = True) -> Tensor:
        """The part of a network's answer that predicts, in the layout of the latents."""
        if self.family.grid and read:
            rows, columns = self.family.grid(self.calls[0].shared)
            out = unpacked(out[:, : rows * columns], (rows, columns))  # a reference picture's tokens come after them
        return self.family.prediction(out, self.x)

    def _inputs(self, branch: Branch) -> Inputs:
        """The arguments of one branch that are its own, and those of its ControlNet under "control"."""
        inputs = self._given(branch)
        if branch.x is not None and branch.at is not None:
            inputs = self._moved(inputs, branch.x, branch.at)
        return inputs if isinstance(branch.cond, str) else _merged(inputs, self._override(branch.cond, inputs))

    def _moved(self, inputs: Inputs, x: Tensor, at: Noise) -> Inputs:
        """The arguments with another sample and the time of its level, those of the ControlNet too."""
        sample = self.family.batch_first[0]
        if any(name in inputs for name in self.family.residuals):
            raise UserError(
                "the ControlNet was asked at another point than this method's branch is at: use another method"
            )
        told: Inputs = {} if numbers(at) == numbers(self.at) else {TIME: self._told(inputs, at)}
        moved: Inputs = {**inputs, sample: self._laid_out(x, inputs[sample]), **told}
        if "control" in inputs:
            moved["control"] = {**inputs["control"], CONTROLNET_INPUTS[0]: moved[sample], **told}
        return moved

    def _laid_out(self, x: Tensor, sample: Tensor) -> Tensor:
        """x (B, C, ...) as the network reads it, in place of `sample`, whose other channels (a mask) stay."""
        if self.family.grid:
            made = packed(x).to(sample)
        else:
            made = torch.cat([x.to(sample), sample[:, x.shape[1] :]], dim=1)
        if made.shape != sample.shape:
            raise UserError(
                f"the network of {self.family.name} reads {tuple(sample.shape)}, more than the latents"
                f" {tuple(x.shape)}, so that no branch can be at another point: use another method"
            )
        return made

    def _told(self, inputs: Inputs, at: Noise) -> Tensor:
        """The time that the network is told at a level, like the one that it was told. UserError if that was not what
        `Family.time` has it be."""
        family, call = self.family, self.calls[0]
        was = torch.as_tensor(inputs.get(TIME, call.shared.get(TIME)), device=self.x.device)
        steps = (self.clock(self.at), self.clock(at), torch.tensor(0.0), torch.tensor(1000.0))
        here, there, first, last = (family.time(unwrap_module(call.network), step).to(was.device) for step in steps)
        if not ((was - here).abs() < 0.01 * (last - first).abs()).all():
            raise UserError(
                f"the network is told the time {float(was.flatten()[0]):g} at a level where its scheduler's timestep"
                f" would be {float(here):g}, so that no branch can be at another level: use another scheduler"
            )
        return there.to(was.dtype).expand(was.shape)

    def _given(self, branch: Branch) -> Inputs:
        """The batch-first arguments (B, ...) that the pipeline prepared for the condition of a branch."""
        call, position, count = self._place(branch)
        rows = {name: value for name, value in call.rows.items() if self.control is None or name not in RESIDUALS}
        inputs = each(lambda v: v.chunk(count)[position], rows)
        if self.control is not None and not (self._guessing and self.branches[position] == "uncond"):
            parts, part = (1, 0) if self._guessing else (count, position)
            inputs["control"] = each(lambda v: v.chunk(parts)[part], self.control.rows)
        return inputs

    def _place(self, branch: Branch) -> tuple[Call, int, int]:
        """The call that holds a branch, its position along the batch, and how many lie there."""
        cond = branch.cond if isinstance(branch.cond, str) else "cond"
        if branch.patch is not None:  # before its inputs, which another family does not know either
            self._check_patch(branch.patch.partition(":")[0])
        if cond not in self.branches:
            raise UserError(self._missing(cond))
        position = self.branches.index(cond)
        return (self.calls[0], position, len(self.branches)) if self.family.batched else (self.calls[position], 0, 1)

    def _check_patch(self, kind: str) -> None:
        try:
            self.family.known_patch(kind)
        except UserError as error:
            raise UserError(f"{self.method} does not go here: {error}") from error

    def _missing(self, cond: str) -> str:
        family, network = self.family, self.calls[0].network
        if cond not in family.order:
            return f"no condition {cond!r} in family {family.name}; known: {', '.join(family.order)}"
        told = unwrap_module(network).config.get(family.embeds)
        if told and family.batched:
            name = f"{type(unwrap_module(network)).__name__} is guidance-distilled ({family.embeds}={told})"
            alone = f"which {self.method} needs: attach a method that needs 'cond' alone"
            return f"{name}, so its pipeline never evaluates {cond!r}, {alone}"
        distilled = f", of this guidance-distilled model ({family.embeds}={told}) too" if told else ""
        return (
            f"{self.method} needs the branch {cond!r}{distilled}: call the pipeline with {family.prepare}, or take a"
            " method that needs 'cond' alone (--guidance none)"
        )

    def _override(self, cond: Mapping[str, Tensor], inputs: Inputs) -> Inputs:
        """A `Cond`, whose keys are the last parts of the dotted names, under those names. A mask over the text is
        longer where the network reads one over text and picture (Chroma), whose tokens all count."""
        places = {name.rpartition(".")[2]: name for name in self.family.batch_first}
        if unknown := sorted(cond.keys() - places.keys()):
            raise UserError(f"the network takes no {', '.join(unknown)}; known: {', '.join(places)}")
        given = {places[key]: value for key, value in cond.items()}
        if (mask := given.get("attention_mask")) is not None:
            picture = inputs["attention_mask"].shape[1] - mask.shape[1]
            given["attention_mask"] = F.pad(mask.to(inputs["attention_mask"]), (0, picture), value=1)
        return given

    def _run(self, call: Call, branch: Branch, inputs: Inputs) -> Tensor:
        network, patch = branch.network, branch.patch
        if network != "main" and network not in self.networks:
            raise UserError(f"the method evaluates network {network!r}: pass networks={{{network!r}: ...}} to attach")
        forward, module = (call.forward, call.network) if network == "main" else (self.networks[network],) * 2
        inputs = {**inputs, **self._residuals(inputs.get("control"))}
        inputs.pop("control", None)
        with self._patched(module, patch) as prepare:
            inputs = inputs if prepare is None else prepare(inputs, tuple(self.x.shape))
            arguments = nested({**call.shared, **inputs, "return_dict": False})
            return self._predicted(forward(**self.family.scattered(arguments))[0])

    def _residuals(self, inputs: Inputs | None) -> Inputs:
        if self.control is None:
            return {}
        if inputs is None:
            return dict.fromkeys(RESIDUALS)
        arguments = nested({**self.control.shared, **inputs, "return_dict": False})
        return dict(zip(RESIDUALS, self.control.forward(**arguments), strict=True))

    def _patched(self, network: nn.Module, patch: str | None) -> AbstractContextManager[Any]:
        return nullcontext() if patch is None else self.family.patched(network, patch)


def plain(branch: Branch) -> str:
    """The condition's name, for a branch that is nothing but a named condition; "" for any other."""
    return branch.cond if isinstance(branch.cond, str) and branch[1:] == PLAIN else ""


PLAIN = Branch("")[1:]  # what a branch has beside its condition, unless it says otherwise


def named(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    names = _parameters(type(unwrap_module(network)).forward)
    return {**dict(zip(names, args, strict=False)), **kwargs}  # fewer are given by place than there are names


@cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    """The names of a forward's arguments without `self`: inspection is slow, and says the same in every step."""
    return list(inspect.signature(forward).parameters)[1:]


def sorted_out(arguments: Mapping[str, Any], batch_first: Sequence[str]) -> tuple[Inputs, Inputs]:
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
        if parent:
            arguments[parent] = {**(arguments.get(parent) or {}), key: value}
        else:
            arguments[name] = value
    return arguments


def _merged(inputs: Inputs, override: Inputs) -> Inputs:
    """`inputs` with some arguments replaced, those of the ControlNet of the same names too."""
    merged = {**inputs, **override}
    if "control" in inputs:
        merged["control"] = {name: override.get(name, value) for name, value in inputs["control"].items()}
    return merged
