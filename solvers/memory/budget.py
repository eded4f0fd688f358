"""`memory_budget="6GiB"`: one step is measured, and the engine is set so that the predicted peak fits.

With N steps, b images at a time, G and P what one step keeps and its peak in mode "full", S what a checkpointed step
keeps (its latents), P' the peak of recomputing it, D and R the peaks of decoder and reward, all for one image, and
d = `decode_batch` images decoded and rewarded at a time (b at most),

    peak(full)       = H + b N G + max(b (P - G),  d D,  d R)
    peak(checkpoint) = H + b N S + max(b P',       d D,  d R)        revolve:k and truncated:k: k in place of N

What is kept of the images and of their gradients is counted beside, and where the loss calls the network once more (a
divergence), P' in "full" too. H, what is there anyhow, is the weights, their gradients and the optimiser's state. Of
what fits, the cheapest is taken: the fewest network calls, then the fewest other calls, then the most images at a time.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from solvers.denoiser import Path, Predict
from solvers.errors import Caution, UserError
from solvers.memory.checkpointing import apart, block_checkpointing, has_blocks
from solvers.memory.live import UNBOUNDED, Footprint, Function, measured
from solvers.noise import Noise
from solvers.rollout.modes import rollout
from solvers.rollout.revolve import repeated
from solvers.rollout.truncated import steps_carrying
from solvers.samplers.catalogue import Step

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
ZERO = Footprint(0, 0)


def parse_size(text: str | int) -> int:
    """Bytes: "6GiB" -> 6 * 2**30. Raises ValueError for a unit other than `UNITS`, and for nothing or less."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise UserError(f"cannot read the size {text!r}: a number and one of {', '.join(list(UNITS)[1:])}, as in 6GiB")
    return int(float(found[1]) * units[found[2].lower()])


def size_text(size: int) -> str:
    """Rounded up, so that what is read back is no less: 6442450945 -> "6.01GiB"."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if size >= UNITS[unit]), "B")
    return f"{ceil(size / UNITS[unit] * 100) / 100:g}{unit}"


@dataclass(frozen=True)
class Probe:
    """Bytes of one image, measured on one step of the sampler; `held` are the whole run's, whatever is chosen."""

    full: Footprint
    checkpoint: Footprint
    blocks: Footprint | None = None  # as `checkpoint`, with block checkpointing; None: the network has no blocks
    decode: Footprint = ZERO
    decode_blocks: Footprint | None = None
    reward: Footprint = ZERO
    rewards_apart: Footprint | None = None  # each of several rewards recomputed by itself
    inputs: int = 0  # latents and conditions
    held: int = 0
    once_more: bool = False  # the loss calls the network beside the sampler, recomputed on the way back (a divergence)


def probe(
    step: Step,
    predict: Predict,
    x: Tensor,
    levels: Sequence[Noise],
    noise: Sequence[Tensor] | None = None,
    network: Any = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    decoder: Any = None,
    rewards: Sequence[Callable[[Tensor], Tensor]] = (),
    held: int = 0,
    limit: int | None = None,
) -> Probe:
    """The first step of a run, measured for one image: x and the conditions of `predict` have one row.

    decode: latents -> images, checkpointed; rewards: images -> scores. network, decoder: the diffusers models whose
    blocks may be checkpointed. Costs three forwards and backwards of each; weights and random state stay as they are.
    limit: the budget, which the probe itself keeps: what exceeds it is stopped, and is UNBOUNDED.
    """
    room = None if limit is None else limit - held

    def once(gradient: str) -> Function:
        drawn = None if noise is None else noise[:1]
        return lambda x: _outputs(rollout(step, predict, x, levels[:2], gradient, drawn))

    inputs = x.nbytes + sum(t.nbytes for t in predict.tensors if not isinstance(t, nn.Parameter))
    found = Probe(measured(once("full"), x, room), measured(once("checkpoint"), x, room), inputs=inputs, held=held)
    if network is not None and has_blocks(network):
        with block_checkpointing(network):
            found = replace(found, blocks=measured(once("checkpoint"), x, room))
    return found if decode is None else _probe_images(found, x, decode, decoder, rewards, room)


def _outputs(path: Path) -> list[Tensor]:
    """All that the next step holds on to."""
    return [path.x, *([] if path.x0 is None else [path.x0]), *path.memory.values()]


def _probe_images(
    found: Probe,
    x: Tensor,
    decode: Callable[[Tensor], Tensor],
    decoder: Any,
    rewards: Sequence[Callable[[Tensor], Tensor]],
    room: int | None,
) -> Probe:
    to_images: Function = lambda x: [decode(x)]  # noqa: E731
    found = replace(found, decode=measured(to_images, x, room))
    if decoder is not None and has_blocks(decoder):
        with block_checkpointing(decoder):
            found = replace(found, decode_blocks=measured(to_images, x, room))
    with torch.no_grad():
        images = decode(x)
    if rewards:
        found = replace(found, reward=measured(lambda images: [f(images) for f in rewards], images, room))
    if len(rewards) > 1:
        each: Function = lambda images: [apart(f)(images) for f in rewards]  # noqa: E731
        found = replace(found, rewards_apart=measured(each, images, room))
    return found


def parameters_bytes(*models: Any) -> int:
    """Bytes of the parameters and buffers of these models, each counted once."""
    tensors = {t.data_ptr(): t for m in models if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes for t in tensors.values())


def resident(device: torch.device, *models: Any) -> int:
    """The bytes that are held before a run: all of this process on a GPU; on a CPU, the weights of these models."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else parameters_bytes(*models)


@dataclass(frozen=True)
class Plan:
    """The engine's settings, and why. `str(plan)` is one line for people."""

    gradient: str
    micro_batch: int  # images at a time
    batch: int
    blocks: bool = False  # the network's blocks are recomputed
    decoder_blocks: bool = False  # the decoder's are
    rewards_apart: bool = False  # each reward of a sum is recomputed by itself
    decode_batch: int = 1  # images that are decoded, and rewarded, at a time
    peak: int = 0  # predicted, in bytes; 0: not asked for
    calls: float = 0.0  # forwards of the network per step and image, a backward counted as one
    why: str = ""

    def __str__(self) -> str:
        extras = {
            "network blocks recomputed": self.blocks,
            "decoder blocks recomputed": self.decoder_blocks,
            "rewards one at a time": self.rewards_apart,
            f"{self.decode_batch} decoded at a time": self.decode_batch > 1,
        }
        how = ", ".join([self.gradient, *(what for what, on in extras.items() if on)])
        return f"{how}, {self.micro_batch} of {self.batch} images at a time{self.why}"

    def applied(self, network: Any, decoder: Any) -> AbstractContextManager[None]:
        """A context for runs and their backward passes, with the block checkpointing that is planned."""
        models = [model for model, on in ((network, self.blocks), (decoder, self.decoder_blocks)) if on]
        return block_checkpointing(*models) if models else nullcontext()

    @property
    def images(self) -> int:
        """How many images the loop has at once."""
        return self.micro_batch * copies_of(self.gradient)

    @property
    def in_parts(self) -> bool:
        """Whether the images of `images` are decoded and rewarded part by part."""
        return self.images > self.decode_batch

    def split(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of a batch, `micro_batch` at a time."""
        return [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]


def planned(
    found: Probe, budget: str | int, steps: int, batch: int, gradient: str | None = None, decode_batch: int = 1
) -> Plan:
    """The cheapest setting whose predicted peak is within the budget; of mode `gradient` alone, if one is given.

    decode_batch: images that are decoded at a time, if there is room for them.

    Raises ValueError, naming the smallest budget that would do, where none is.
    """
    limit = parse_size(budget)
    plans = sorted(candidates(found, steps, batch, gradient, decode_batch), key=cost)
    fits = [plan for plan in plans if plan.peak <= limit]
    if not fits:
        least = min(plans, key=lambda plan: (plan.peak, cost(plan)))
        enough = size_text(least.peak)
        raise UserError(f"memory_budget {budget} is too small: the least that does is {enough}, as {least}")
    return replace(fits[0], why=_reason(fits[0], plans[0], budget))


def caution_on_cpu() -> None:
    """Warn (`Caution`) that a CPU's budget is of what can be seen there, where there is no accelerator."""
    if not torch.accelerator.is_available():
        warnings.warn(
            "memory_budget on a CPU counts the pipeline's weights and the tensors of the run: a reward's weights, the "
            "scratch of operators and the libraries themselves come on top (64 MiB grew by 131)",
            Caution,
            3,
        )


def cost(plan: Plan) -> tuple[float, int, int, int]:
    """Network calls, then whether anything else is recomputed, then passes over the batch, then through the decoder."""
    passes = ceil(plan.batch / plan.micro_batch)
    return plan.calls, plan.decoder_blocks + plan.rewards_apart, passes, -plan.decode_batch


def candidates(
    found: Probe, steps: int, batch: int, gradient: str | None = None, decode_batch: int = 1
) -> Iterator[Plan]:
    """Every setting there is, with its predicted peak; what the probe did not measure is left out."""
    flags = (False, True)
    for mode, size, at_once in product([gradient] if gradient else _modes(steps), _parts(batch), _parts(decode_batch)):
        blocks = flags if found.blocks and mode != "full" else (False,)
        decoder = flags if found.decode_blocks else (False,)
        rewards = flags if found.rewards_apart else (False,)
        for chosen in product(blocks, decoder, rewards):
            yield with_peak(found, Plan(mode, size, batch, *chosen, decode_batch=at_once), steps)


def _parts(batch: int) -> list[int]:
    """The sizes of equal parts of a batch."""
    return sorted({ceil(batch / parts) for parts in range(1, batch + 1)})


def with_peak(found: Probe, plan: Plan, steps: int) -> Plan:
    """The plan with its peak and its calls."""
    name, kept = plan.gradient.partition(":")[0], kept_steps(plan.gradient, steps)
    call = _measure(found.blocks if plan.blocks else found.checkpoint)
    decode = _measure(found.decode_blocks if plan.decoder_blocks else found.decode)
    apart = found.rewards_apart if plan.rewards_apart or plan.in_parts else None
    reward = _measure(apart or found.reward)
    if name == "full":
        graph, work = kept * found.full.kept, found.full.peak - found.full.kept
    else:
        graph, work = kept * call.kept, call.peak
    work = max(work, call.peak) if found.once_more else work  # while the graph of all steps is there
    beside = plan.micro_batch * (found.inputs + graph) + 3 * plan.images * decode.kept  # images, gradient, its parts
    most = max(plan.micro_batch * work, min(plan.images, plan.decode_batch) * max(decode.peak, reward.peak))
    calls = calls_of(plan.gradient, steps) + plan.blocks
    return replace(plan, peak=found.held + beside + most, calls=calls)


def kept_steps(gradient: str, steps: int) -> int:
    """The greatest number of steps whose latents, or graphs, a mode keeps."""
    name, _, option = gradient.partition(":")
    if name == "truncated":
        return min(copies_of(gradient) * steps_carrying(option), steps)
    if name == "revolve":
        return min(int(option), steps)
    return 2 if name == "reversible" else steps


def copies_of(gradient: str) -> int:
    """The number of images that a mode makes of one noise: truncated:K:draft_lv makes K."""
    name, _, rest = gradient.partition(":")
    kept, _, style = rest.partition(":")
    return int(kept) if (name, style) == ("truncated", "draft_lv") else 1


def calls_of(gradient: str, steps: int) -> float:
    """Forwards of the network per step, a backward pass counted as one: 2 for "full", 3 for "checkpoint"."""
    name, _, option = gradient.partition(":")
    if name == "full":
        return 2.0
    if name == "revolve":
        return 2 + (repeated(steps, int(option)) + 1) / steps  # the last step, too, is first run plainly
    return 1 + 2 * copies_of(gradient) * steps_carrying(option) / steps if name == "truncated" else 3.0


def _modes(steps: int) -> list[str]:
    return ["full", "checkpoint", *(f"revolve:{slots}" for slots in range(1, steps))]


def _measure(memory: Footprint | None) -> Footprint:
    assert memory is not None
    return memory


def _reason(chosen: Plan, fastest: Plan, budget: str | int) -> str:
    peak = f" (predicted peak {size_text(chosen.peak)} of {budget}"
    if chosen is fastest:
        return peak + "; nothing is faster)"
    needs = "more" if fastest.peak >= UNBOUNDED.peak else size_text(fastest.peak)
    return f"{peak}; the fastest, {fastest}, needs {needs})"
