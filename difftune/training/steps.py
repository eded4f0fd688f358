"""One optimiser step: the backward pass of every batch, one update, and what to do if something is not finite."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from difftune import processes
from difftune.errors import RunError
from difftune.files import checkpoint
from difftune.training.state import Metrics, Training, gather_whole
from rewards.errors import NotFinite
from rewards.registry import Reward

Batch = TypeVar("Batch")


@contextmanager
def attempt_step(run: Training, step: int) -> Iterator[Metrics]:
    """Around one optimiser step of a recipe, which puts what it met into the metrics that are given.

    A step with a reward or a gradient that is not finite is skipped in every process, and counted. Raises RunError,
    with the step, for the first beyond `config.max_skipped_steps`.
    """
    started, config = time.perf_counter(), run.config
    if run.generators is not None:  # whatever was loaded since the state was read has drawn from them
        with checkpoint.going_on():
            checkpoint.restore(run.generators)
        run.generators = None
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * run.rate(step)
    run.scales.renew()
    metrics: Metrics = {"step": step + 1}
    try:
        yield metrics
    except NotFinite as error:
        run.optimizer.zero_grad()
        run.skipped += 1
        if run.skipped > config.max_skipped_steps:
            raise RunError(f"step {step + 1}: {error}; checkpoints are as they were") from error
        processes.say_once(f"step {step + 1} is skipped, {run.skipped} of {config.max_skipped_steps}: {error}")
    rate = run.optimizer.param_groups[0]["lr"]
    means = {f"reward.{name}": found.mean for name, found in run.scales.latest.items()}
    metrics.update({**means, "lr": rate, "skipped": run.skipped, "seconds": time.perf_counter() - started})


def take_step(
    run: Training,
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], tuple[Tensor, Mapping[str, Tensor]]],
    sizes: Sequence[int] | None = None,
    normalized: bool = False,
) -> Metrics:
    """Descend once by the gradient of the batches' mean loss: a backward pass for each, and one update.

    loss_of(batch) gives the loss () with its graph, and tensors () to report by name. Returned are their means over
    all batches and processes, beside the loss, unless its name is among them, and the gradient's norm, with what
    `Training.gradients` finds. sizes: the weights of the batches in the means; None: all alike. normalized: bring the
    gradient to the norm that the clip allows. Raises NotFinite as `update_weights` does.
    """
    sizes = [1] * len(batches) if sizes is None else sizes
    met: list[dict[str, Tensor]] = []
    for i, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        with run.learning(last=i == len(batches) - 1):
            loss, found = loss_of(batch)
            differentiate(run, loss * size / sum(sizes))
        met.append({name: value.detach() * size for name, value in {"loss": loss, **found}.items()})
    norm = update_weights(run, normalized)
    means = torch.stack([torch.stack(list(found.values())).float() for found in met]).sum(0) / sum(sizes)
    loss, *rest = run.accelerator.gather(means[None]).mean(0).tolist()
    agreement = run.gradients.metrics if run.gradients is not None else {}
    return {"loss": loss, "grad_norm": norm, **agreement, **dict(zip(list(met[0])[1:], rest, strict=True))}


def differentiate(run: Training, loss: Tensor) -> None:
    """Add the loss's gradient to the weights'. Raises NotFinite if the engine meets one that is not finite."""
    try:
        run.accelerator.backward(loss)
    except FloatingPointError as error:
        if run.world > 1:  # the others are on their way to a gradient that will never come
            raise RunError(f"{error}; checkpoints are as they were") from error
        raise NotFinite(str(error)) from error


def update_weights(run: Training, normalized: bool = False) -> float:
    """Clip the gradient, take an optimiser step, and return the norm before the clip.

    normalized: a gradient that is shorter than the clip is scaled up to it.

    Raises NotFinite if that is not finite. Under float16 the loss scaler finds its scale by overflowing: it then
    skips the step by itself, and -1 is returned, unless the loss is no longer scaled up at all.
    """
    norm = run.accelerator.clip_grad_norm_(list(run.weights.values()), run.config.max_grad_norm)
    norm = float(gather_whole(norm))
    fault, scaler = f"the gradient is not finite, its norm is {norm}", run.accelerator.scaler
    if not norm < float("inf") and scaler is None:
        raise NotFinite(fault)
    if normalized and 0 < norm < run.config.max_grad_norm:
        scale_gradient(run, run.config.max_grad_norm / norm)
    if run.gradients is not None and norm < float("inf"):
        run.gradients.see(gradients_of(run))
    run.optimizer.step()
    run.optimizer.zero_grad()
    if not norm < float("inf") and scaler.get_scale() < 1:
        raise NotFinite(f"{fault}, with its loss scaled by {scaler.get_scale():g}")
    if run.average is not None and not run.accelerator.optimizer_step_was_skipped:
        run.average.update(run.weights)
    return norm if norm < float("inf") else -1.0


def scale_gradient(run: Training, factor: float) -> None:
    for weight in run.weights.values():
        if weight.grad is not None:
            weight.grad.mul_(factor)


def gradients_of(run: Training) -> list[Tensor]:
    """Each weight's gradient, 0 where it has none."""
    weights = run.weights.values()
    return [gather_whole(torch.zeros_like(w) if w.grad is None else w.grad) for w in weights]


# ------------------------------------------------------------------------------------------------ rewards


def score_images(reward: Reward, images: Tensor, prompts: Sequence[str], run: Training) -> Tensor:
    """The scores (B,). Raises NotFinite, in every process, if one of any process is not finite.

    What each reward of a `ScaledSum` gave is counted in `run.scales`.
    """
    scores, fault = None, None
    run.scales.listen()
    try:
        scores = reward(images, prompts)
        if not scores.isfinite().all():
            fault = f"the reward for {prompts[int(scores.isfinite().int().argmin())]!r} is not finite"
    except NotFinite as error:
        fault = str(error)
    met = run.scales.take()
    everyone = gather_object([(fault, prompts, None if scores is None else scores.detach().tolist(), met)])
    for found, *_ in everyone:
        if found is not None:
            raise NotFinite(found)
    for _, its, values, parts in everyone:
        run.seen.update(its, values)
        run.scales.count(parts)
    assert scores is not None
    return scores


def gather_statistics(run: Training, scores: Sequence[Tensor]) -> Metrics:
    """Mean, standard deviation and range of all processes' scores, of which each batch has (B,); {} without any."""
    return statistics(run.accelerator.gather(torch.cat(list(scores)))) if scores else {}


def statistics(scores: Tensor) -> Metrics:
    """Mean, standard deviation and range of the scores (N,)."""
    return {
        "reward_mean": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "reward_min": scores.min().item(),
        "reward_max": scores.max().item(),
    }
