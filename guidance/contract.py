"""The contract between guidance methods and whoever evaluates networks for them, and the driver that runs it.

A method is a generator. It yields the evaluations that it wants, is sent the answers, may want more, and returns:

    p = yield {"cond": Branch("cond"), "uncond": Branch("uncond")}
    return Guided(p["uncond"] + scale * (p["cond"] - p["uncond"]))

It never learns whether a diffusers pipeline (`guidance.attach.handle`) or our own loop (`guidance.guided`) runs it.
"""

import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from solvers.denoiser import SPACES, Cond, Memory, Path, lines, widen
from solvers.errors import UserError
from solvers.noise import Noise, noise, numbers


class Branch(NamedTuple):
    """One evaluation of a network."""

    cond: str | Cond  # a named condition ("cond", "uncond", ...), or tensors that override cond's
    rows: Tensor | None = None  # (B,) bool: the samples that need it; None = all
    network: str = "main"  # or "weak" (autoguidance)
    patch: str | None = None  # a named change inside the forward pass, provided by the family
    x: Tensor | None = None  # (B, ...), where else than at path.x it is evaluated, in the same coordinates
    at: Noise | None = None  # the noise level of `x`; both are given, or neither


Request = Mapping[str, Branch]
Answers = dict[str, Tensor]
Evaluate = Callable[[Request], Answers]  # raw outputs (B, ...), NaN in the rows that were not evaluated


Point = tuple[Tensor, Noise]  # (x, at): where a network is evaluated


class Preds(dict[str, Tensor]):
    """All answers so far, each (B, ...), in `space`; rows that were not evaluated hold NaN, so use torch.where.

    Each is converted at its own point, (x, at) of the path or those of its `Branch`.
    """

    def __init__(self, space: str, output: str):
        super().__init__()
        self.space, self.output = space, output  # `output` is what the network emits
        self._points: dict[str, Point] = {}

    def __missing__(self, name: str) -> Tensor:
        raise UserError(f"the method reads {name!r} of its answers, and asked for {', '.join(self) or 'nothing'}")

    def add(self, name: str, out: Tensor, space: str, point: Point) -> None:
        """The answer `out`, which is in `space`."""
        self._points[name] = point
        self[name] = convert(out, space, self.space, *point)

    def to(self, name: str, space: str) -> Tensor:
        """The answer as "x0", "eps", "v", "flow" or "output", (B, ...), in float32 or better: for measuring."""
        to = self.output if space == "output" else space
        return widen(convert(self[name], self.space, to, *self._points[name]))

    def in_space(self, space: str) -> "Preds":
        """All of them in another space."""
        other = Preds(space, self.output)
        for name, out in self.items():
            other.add(name, out, self.space, self._points[name])
        return other


class Guided(NamedTuple):
    """The result of a guidance method, in the method's space."""

    out: Tensor  # (B, ...), the prediction that the sampler steps with
    data: Tensor | None = None  # (B, ...), CFG++ only: says where the clean data is; shift = x0(data) - x0(out)
    memory: Memory = {}


Guide = Generator[Request, Preds, Guided]


class Guidance(Protocol):
    """A guidance method: a frozen dataclass with one generator.

    `space` is the one that it is defined in: "x0", "eps", "v", "flow", or "output" (whatever the network emits). "any"
    is for affine methods (weights that sum to one), whose result is the same in every space. A method with a space of
    its own asks at least one branch for all rows. One that asks for a branch at another point names its space: only
    there do answers of several points mean something together.
    """

    @property
    def space(self) -> str: ...
    def guide(self, path: Path, at: Noise) -> Guide: ...


class Combined(NamedTuple):
    """The result of a guidance method, in the network's space."""

    out: Tensor  # (B, ...)
    shift: Tensor | None  # (B, ...), x0(data) - x0(out)
    memory: Memory


def line(space: str, to: str, at: Noise) -> tuple[Tensor, Tensor]:
    """(a, b) with out_to = a * x + b * out_space."""
    if space == to:
        return torch.zeros_like(at.alpha), torch.ones_like(at.alpha)
    p, q, m, n = lines(space, at)
    if to == "x0":
        return p, q
    if to == "eps":
        return m, n
    x0, eps = (-at.sigma, at.alpha) if to == "v" else (-torch.ones_like(at.alpha), torch.ones_like(at.alpha))
    return x0 * p + eps * m, x0 * q + eps * n


def convert(out: Tensor, space: str, to: str, x: Tensor, at: Noise) -> Tensor:
    """`out`, which is in `space` at (x, at), in the space `to`: itself if they agree, else float32 or better."""
    if space == to:
        return out
    a, b = _slopes(space, to, at)
    return a * widen(x) + b * widen(out)


def _slopes(space: str, to: str, at: Noise) -> tuple[Any, Any]:
    """`line`, as floats that are computed once for each level if that can be."""
    values = numbers(at)
    return line(space, to, at) if values is None else _kept_slopes(space, to, *values)


@functools.lru_cache(maxsize=2**12)
def _kept_slopes(space: str, to: str, alpha: float, sigma: float) -> tuple[float, float]:
    a, b = line(space, to, noise(alpha, sigma))
    return float(a), float(b)


def drive(guidance: Guidance, evaluate: Evaluate, path: Path, at: Noise, space: str, output: str) -> Combined:
    """Run a method's generator: `evaluate` answers its requests in `space`, and the network itself emits `output`.

    An affine method sees the answers as they are. One with a space of its own sees them converted, and its result goes
    back by the difference from a reference branch r, out = r + (g - r_own) / b with r_own = a * x + b * r: no
    cancellation, and r itself if b is 0 (at sigma = 0 every x0 is x).

    Raises ValueError for a method that asks for or returns what the contract does not have, for an unknown space, for a
    method with a space of its own that asks no branch for all rows, and for a branch at another point that has no level
    of its own or is asked for by a method of the space "any".
    """
    own = own_space(guidance, space, output)
    raw: Answers = {}
    complete: list[str] = []
    preds = Preds(own, output)
    guide = _started(guidance, path, at)
    reply = _advance(guide, None)
    while isinstance(reply, Mapping):
        request = {name: _settled(_branch(guidance, name, branch)) for name, branch in reply.items()}
        elsewhere = {name: _elsewhere(guidance, branch) for name, branch in request.items()}
        complete += [name for name, branch in request.items() if branch.rows is None and elsewhere[name] is None]
        raw.update(evaluate(request))
        for name in request:
            preds.add(name, raw[name], space, elsewhere[name] or (path.x, at))
        reply = _advance(guide, preds)
    _check_reply(guidance, reply, path.x)
    shift = None if reply.data is None else line(own, "x0", at)[1] * (widen(reply.data) - widen(reply.out))
    if own == space:
        out = reply.out.to(next(iter(raw.values())).dtype) if raw else reply.out
    else:
        out = _restored(guidance, reply.out, raw, preds, complete, line(space, own, at)[1])
    return Combined(out, shift, reply.memory)


def within(guidance: Guidance, path: Path, at: Noise) -> Generator[Request, Preds, tuple[Guided, Preds]]:
    """Run a method inside another one, whose space it is handed: what it made and all answers, both in that space.

    A method with a space of its own is converted to it and back by the difference from its branch "cond", as in
    `drive`. Raises ValueError if it asks for no "cond".
    """
    guide = _started(guidance, path, at)
    reply, preds, own = _advance(guide, None), None, None
    while isinstance(reply, Mapping):
        preds = yield reply
        own = preds if guidance.space in ("any", "output", preds.space) else preds.in_space(guidance.space)
        reply = _advance(guide, own)
    if preds is None or own is None or "cond" not in preds:
        raise UserError(f"{type(guidance).__name__} asks for no branch 'cond', which the method around it needs")
    if own is preds:
        return reply, preds
    slope = line(preds.space, own.space, at)[1]
    back = functools.partial(_restored, guidance, raw=preds, preds=own, complete=["cond"], slope=slope)
    return reply._replace(out=back(reply.out), data=None if reply.data is None else back(reply.data)), preds


def check_method(guidance: object) -> None:
    """UserError for what is not a guidance method."""
    if isinstance(guidance, type):
        raise UserError(f"{guidance.__name__} is a class: make a guidance method of it, as in {guidance.__name__}()")
    if missing := {"guide", "space"} - set(dir(guidance)):
        raise UserError(
            f"{type(guidance).__name__} is not a guidance method, it has no {' and no '.join(sorted(missing))}: a "
            'method has space = "any" and a generator guide(self, path, at), as docs/guides/your-guidance.md shows'
        )


def own_space(guidance: Guidance, space: str, output: str) -> str:
    """The space in which a method sees answers that come in `space`, from a network that emits `output`."""
    if guidance.space not in (*SPACES, "any", "output"):
        known = ", ".join((*SPACES, "any", "output"))
        raise UserError(f"{type(guidance).__name__} has space {guidance.space!r}; known: {known}")
    return {"any": space, "output": output}.get(guidance.space, guidance.space)


def _started(guidance: Guidance, path: Path, at: Noise) -> Guide:
    """The method's generator. UserError for a `guide` that yields nothing, which is no generator."""
    guide = guidance.guide(path, at)
    if not isinstance(guide, Generator):
        raise UserError(
            f"{type(guidance).__name__}.guide has no yield: ask for what it needs, as in"
            ' preds = yield {"cond": Branch("cond")}'
        )
    return guide


def _branch(guidance: Guidance, name: str, branch: object) -> Branch:
    """UserError for what a method yields in a branch's place."""
    if not isinstance(branch, Branch):
        raise UserError(
            f"{type(guidance).__name__}.guide asks for {name!r} by a {type(branch).__name__}: yield Branch objects, as"
            f" in {{{name!r}: Branch({name!r})}}"
        )
    return branch


def _check_reply(guidance: Guidance, reply: object, x: Tensor) -> None:
    """UserError for what is neither a request nor a result for x (B, ...)."""
    name = f"{type(guidance).__name__}.guide"
    if isinstance(reply, Branch):
        raise UserError(f'{name} yields a Branch: yield a dictionary, as in {{"cond": Branch("cond")}}')
    if not isinstance(reply, Guided):
        raise UserError(f"{name} returned {type(reply).__name__}: return Guided(prediction)")
    if reply.out.shape != x.shape:
        raise UserError(f"{name} returned a prediction of shape {tuple(reply.out.shape)}, and x has {tuple(x.shape)}")


def _advance(guide: Guide, preds: Preds | None) -> Request | Guided:
    """The generator's next request, or what it returns."""
    try:
        return guide.send(preds)  # type: ignore[arg-type]  # the first send of a generator is None
    except StopIteration as stop:
        return stop.value


def _elsewhere(guidance: Guidance, branch: Branch) -> Point | None:
    """The point of a branch that has its own. UserError for half of one, and for a method that names no space."""
    if branch.x is None and branch.at is None:
        return None
    name = type(guidance).__name__
    if branch.x is None or branch.at is None:
        raise UserError(f"{name} asks for a branch with {'at' if branch.x is None else 'x'} alone: give both, x and at")
    if guidance.space == "any":
        raise UserError(
            f"{name} asks for a branch at another point, so its result depends on the space: give it"
            ' space = "flow", or another that it is defined in'
        )
    return branch.x, branch.at


def _settled(branch: Branch) -> Branch:
    """rows=None if all rows are asked for, so that whole batches take the short way."""
    whole = branch.rows is not None and bool(branch.rows.all())
    return branch._replace(rows=None) if whole else branch


def _restored(
    guidance: Guidance, out: Tensor, raw: Mapping[str, Tensor], preds: Preds, complete: list[str], slope: Tensor
) -> Tensor:
    if not complete:
        name = type(guidance).__name__
        raise UserError(f"{name} works in {preds.space} and asks no branch for all rows; leave rows=None in one")
    reference = raw[complete[0]]
    if not 0 < slope.abs() < torch.inf:
        return reference
    return (widen(reference) + (out - preds[complete[0]]) / slope).to(reference.dtype)
