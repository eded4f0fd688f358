"""Methods as guiders of diffusers' modular pipelines.

    pipe.update_components(guider=as_guider(Rescale(CFG(7.5), phi=0.7)))

A guider is handed the two predictions of a step and nothing else: neither the latents nor the noise level, and it keeps
no memory. So only methods that need none of that can be one.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from guidance.contract import Guidance, drive
from guidance.methods.catalogue import CFG, FDG, GUIDANCE, TCFG, CFGZeroStar, Rescale
from solvers.denoiser import SPACES, Path
from solvers.errors import UserError
from solvers.noise import noise

COMBINES = (CFG, CFGZeroStar, TCFG, FDG, Rescale)


def as_guider(guidance: Guidance) -> "Guider":
    """The method as a `BaseGuidance`, for `pipe.update_components(guider=...)`; it saves and reloads as any other.

    It combines what the network emits, so TCFG wants an eps network and CFGZeroStar one of a flow.
    Raises ValueError for a method that needs more than two predictions of one step, and for settings that are no
    numbers, which a guider's configuration cannot keep.
    """
    name, settings = _described(guidance)
    return Guider(guidance=name, settings=settings)  # by name: diffusers takes positional values for defaults


class Guider(BaseGuidance):
    """One of `GUIDANCE` by name and settings; a method inside another is {"guidance": name, "settings": {...}}."""

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance: str = "cfg",
        settings: dict[str, Any] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        self.method = _built({"guidance": guidance, "settings": settings or {}})
        _described(self.method)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch(data, i, name) for i, name in self._asked()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in self._asked()]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The method's prediction; the conditional one outside [start, stop) and when disabled."""
        pred = pred_cond if pred_uncond is None else combined(self.method, pred_cond, pred_uncond)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._active() else 1

    def _asked(self) -> list[tuple[int, str]]:
        return list(enumerate(self._input_predictions))[: self.num_conditions]

    def _active(self) -> bool:
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        first, last = (int(part * self._num_inference_steps) for part in (self._start, self._stop))
        return first <= self._step < last


def combined(guidance: Guidance, cond: Tensor, uncond: Tensor) -> Tensor:
    """The method's result for two raw predictions (B, ...), taken to be in the method's own space."""
    space = guidance.space if guidance.space in SPACES else "flow"
    answers = {"cond": cond, "uncond": uncond}
    return drive(guidance, lambda request: answers, Path(cond), noise(1.0, 1.0), space, space).out


def _described(guidance: Any) -> tuple[str, dict[str, Any]]:
    """The method's name and settings."""
    kind = type(guidance).__name__
    if not isinstance(guidance, COMBINES):
        known = ", ".join(method.__name__ for method in COMBINES)
        raise UserError(f"{kind} cannot be a guider, which sees two predictions of one step and no more; can: {known}")
    if isinstance(guidance, CFGZeroStar) and guidance.zero_steps:
        raise UserError("CFGZeroStar as a guider does not know which step is the first; set zero_steps=0")
    name = next(name for name, method in GUIDANCE.items() if method is type(guidance))
    return name, {f.name: _plain(kind, f.name, vars(guidance)[f.name]) for f in fields(guidance)}


def _plain(owner: str, field: str, value: Any) -> Any:
    if field == "method":
        name, settings = _described(value)
        return {"guidance": name, "settings": settings}
    if not isinstance(value, int | float):
        raise UserError(f"{owner}.{field} is a {type(value).__name__}, which a guider cannot save; pass a number")
    return value


def _built(description: Mapping[str, Any]) -> Guidance:
    settings = {k: _built(v) if isinstance(v, Mapping) else v for k, v in description["settings"].items()}
    return GUIDANCE[description["guidance"]](**settings)
