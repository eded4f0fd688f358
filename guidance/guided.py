"""Guidance in our own loop: a denoiser, a method and its conditions as one `Predict`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from guidance.branches import Counter, Inputs, evaluate, tensors_in, wanted
from guidance.contract import Answers, Branch, Combined, Guidance, Request, check_method, drive
from guidance.methods.compose import moves
from solvers.denoiser import Cond, Denoiser, Path, Prediction, predicted, widen
from solvers.errors import UserError
from solvers.families.after import After
from solvers.noise import Noise


@runtime_checkable
class Parametrised(Protocol):
    """A denoiser that shows its parameters, as `nn.Module` does."""

    def parameters(self) -> Iterable[Tensor]: ...


@runtime_checkable
class OfRuns(Protocol):
    """A denoiser that can read once what does not change within a run."""

    def one_run(self) -> Denoiser: ...


@runtime_checkable
class Finished(Protocol):
    """A denoiser that knows what its pipeline does to every guided prediction."""

    @property
    def after(self) -> After | None: ...


@dataclass(frozen=True)
class GuidedPredict:
    """A guided `Predict`, made by `guided`.

    An affine method is handed u = eps - x0, which no noise level makes ill-conditioned. What the denoiser's pipeline
    does to every guided prediction (Qwen-Image's norm) is done where "uncond" was evaluated, at whichever point;
    ValueError there for a method that shifts x0, moves the latents, or asks for no "cond". `tensors` are what a
    gradient may be asked for: the conditions, the tensors that are fields of the method, and the parameters that
    require grad.
    """

    networks: Mapping[str, Denoiser]
    guidance: Guidance
    conds: Mapping[str, Cond]
    counter: Counter = field(default_factory=Counter)
    weights: tuple[Tensor, ...] = ()  # the parameters that require grad

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        every = (*tensors_in(self.conds), *tensors_in(vars(self.guidance)), *self.weights)
        return tuple({id(tensor): tensor for tensor in every}.values())

    @property
    def nfe(self) -> int:
        """Rows evaluated since the counter was made; recomputation under checkpointing counts, since it is work."""
        return self.counter.rows

    @property
    def branches(self) -> dict[str, int]:
        """The rows of `nfe` by branch, under the names that the method gives them ("cond", "uncond", ...)."""
        return dict(self.counter.branches)

    def __call__(self, path: Path, at: Noise) -> Prediction:
        """The guided prediction at (path.x, at), in float32 or better; `memory` holds what the method wrote."""
        x = widen(path.x)
        asked: dict[str, Tensor] = {}  # the answers by condition: at (path.x, at), "uncond" wherever it was asked for

        def answer(request: Request) -> Answers:
            answers = evaluate(request, inputs, call, x, self.counter)
            asked.update({str(b.cond): answers[name] for name, b in request.items() if _known(b)})
            return answers

        def inputs(branch: Branch) -> Inputs:
            return {"x": x if branch.x is None else widen(branch.x), "cond": self._cond(branch)}

        def call(branch: Branch, inputs: Inputs) -> Tensor:
            return self._direction(branch, at if branch.at is None else branch.at, inputs)

        output = self.networks["main"].prediction_type
        made = drive(self.guidance, answer, path, at, "flow", output)
        u, shift, memory = self._finished(made, asked)
        return predicted("flow", x, at, u, memory)._replace(shift=shift)

    def _finished(self, made: Combined, asked: Mapping[str, Tensor]) -> Combined:
        """The guided u after what the denoiser's pipeline does to it."""
        main = self.networks["main"]
        after = main.after if isinstance(main, Finished) else None
        if after is None or after.always is None or "uncond" not in asked:
            return made
        if made.shift is not None or "cond" not in asked or moves(self.guidance):
            name = type(self.guidance).__name__
            raise UserError(f"{name} has no guided prediction for the pipeline's {after.name}: {after.remedy}")
        return made._replace(out=after.always(made.out, asked["cond"]))

    def _cond(self, branch: Branch) -> Cond:
        if not isinstance(branch.cond, str):
            return {**self.conds["cond"], **branch.cond}
        if branch.cond not in self.conds:
            raise UserError(f"no condition {branch.cond!r}; given: {', '.join(self.conds)}")
        return self.conds[branch.cond]

    def _direction(self, branch: Branch, at: Noise, inputs: Inputs) -> Tensor:
        """u = eps - x0, (rows, ...), of the branch's network."""
        network = branch.network
        if network not in self.networks:
            raise UserError(f"the method evaluates network {network!r}; pass guided(..., {network}=its denoiser)")
        denoise = self.networks[network]
        if branch.patch is None:
            said = denoise(inputs["x"], at, inputs["cond"])
        else:
            with denoise.patched(branch.patch) as prepare:
                cond = inputs["cond"] if prepare is None else prepare(inputs["cond"], tuple(inputs["x"].shape))
                said = denoise(inputs["x"], at, cond)
        return said.eps - said.x0


def guided(
    denoise: Denoiser,
    guidance: Guidance,
    conds: Mapping[str, Cond],
    weak: Denoiser | None = None,
    counter: Counter | None = None,
) -> GuidedPredict:
    """A `Predict` for any solver that follows `guidance`.

    conds: named conditions, each a mapping of batch-first tensors; "cond" must be there, "uncond" for most methods.
    weak: the denoiser of `Branch(network="weak")`. counter: counts the rows evaluated; its own by default.
    """
    check_method(guidance)
    if "cond" not in conds:
        raise UserError(f"conds has no 'cond'; given: {', '.join(conds) or 'nothing'}")
    networks = {name: _for_one_run(d) for name, d in {"main": denoise, "weak": weak}.items() if d is not None}
    return GuidedPredict(networks, guidance, conds, counter or Counter(), tuple(_trained(networks)))


def _known(branch: Branch) -> bool:
    """Whether it is the network itself, for any sample, at the sample and its level; "uncond" counts at any point."""
    itself = branch.network == "main" and branch.patch is None and wanted(branch)
    return itself and (branch.x is None or branch.cond == "uncond")


def _for_one_run(denoise: Denoiser) -> Denoiser:
    return denoise.one_run() if isinstance(denoise, OfRuns) else denoise


def _trained(networks: Mapping[str, Any]) -> Iterator[Tensor]:
    for denoise in networks.values():
        if isinstance(denoise, Parametrised):
            yield from (p for p in denoise.parameters() if p.requires_grad)
