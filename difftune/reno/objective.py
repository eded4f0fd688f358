"""The function that noise optimisation minimises, for a batch of samples: images, rewards, regulariser, gradient.

    L(z) = gamma K(noise) - sum_i w_i R_i(decode(sample(noise, c)), c),

of z (B, D): the noise itself, a change of the prompt's embedding, or both, one row per sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difftune.errors import RunError
from difftune.lookup import sampler_named
from difftune.pipelines.engine import bound_mode, frozen, held, moving, plan_for, probe_step, scores_of, step_of
from difftune.pipelines.method_parts import Equipped, guided_by
from difftune.reno.regularizers import REGULARIZERS
from difftune.reno.settings import NoiseSettings, Variables
from guidance.branches import Counter
from guidance.guided import GuidedPredict
from rewards.checks import checked
from rewards.compose import WeightedSum
from solvers.denoiser import Cond, widen
from solvers.latent import LatentModel
from solvers.memory.budget import Plan, Probe, probe
from solvers.noise import Noise
from solvers.rollout.modes import rollout, unchecked_gradients, watch_gradients

EMBEDDING = "encoder_hidden_states"  # the condition that may be optimised, which every family has


class Iteration(NamedTuple):
    """One evaluation of all samples, before their update; each tensor is on the CPU and holds a number per sample.

    Samples that have left the batch hold NaN.
    """

    parts: dict[str, Tensor]  # each reward, without its weight
    total: Tensor  # (B,), the weighted sum: what is maximised, and what chooses the best
    regularizer: Tensor  # (B,), K
    grad_norm: Tensor  # (B,), before the clip; 0 if no gradient was needed
    held_out: Tensor | None = None  # (B,), a reward that is watched and not optimised


class Evaluated(NamedTuple):
    """The results of one evaluation of A samples."""

    images: Tensor  # (A, 3, H, W) in [0, 1]
    record: Iteration
    loss: Tensor  # (A,), float32 or better
    gradient: Tensor | None  # (A, D)


@dataclass(frozen=True)
class Unknowns:
    """The layout of z (B, D): the noise's elements, then the change of the prompt's embedding in units of its RMS."""

    of: Variables
    noise: Tensor  # (B, C, h, w), where it starts
    embedding: Tensor  # (B, L, E), the prompt's

    def start(self) -> Tensor:
        still = torch.zeros_like(self.embedding).flatten(1)
        parts = {"noise": [self._flat], "prompt": [still], "both": [self._flat, still.to(self._flat)]}[self.of]
        return torch.cat(parts, dim=1).clone()

    @property
    def _flat(self) -> Tensor:
        return self.noise.flatten(1)

    @property
    def _elements(self) -> int:
        """How many elements of z are the noise's."""
        return 0 if self.of == "prompt" else self._flat.shape[1]

    @property
    def dimension(self) -> int:
        """How many elements the learning rate depends on: the noise's, or the embedding's if it moves alone."""
        return self._elements or self.embedding[0].numel()

    def noise_of(self, z: Tensor, rows: Tensor) -> Tensor:
        """(A, C, h, w) of z (A, D), the samples `rows`."""
        if self.of == "prompt":
            return self.noise[rows]
        return z[:, : self._elements].view(-1, *self.noise.shape[1:])

    def embedding_of(self, z: Tensor, rows: Tensor) -> Tensor:
        """(A, L, E) = e + RMS(e) v."""
        own = self.embedding[rows]
        if self.of == "noise":
            return own
        return own + rms(own) * z[:, self._elements :].view_as(own)

    def within(self, z: Tensor, rows: Tensor, limit: float | None) -> Tensor:
        """The nearest z of which neither part is farther from its start than `limit` times the start's norm."""
        if limit is None:
            return z
        n, still = self._elements, z.new_zeros(len(z), z.shape[1] - self._elements)
        width = still.new_full((len(z), 1), float(still.shape[1]) ** 0.5)
        start = self._flat[rows][:, :n].to(z)
        return torch.cat(
            [
                projected(z[:, :n], start, limit * start.norm(dim=1, keepdim=True)),
                projected(z[:, n:], still, limit * width),
            ],
            dim=1,
        )


def projected(z: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The point of the ball (centre (A, D), radius (A, 1)) that is nearest to z."""
    away = z - centre
    length = away.norm(dim=1, keepdim=True)
    return torch.where(length > radius, centre + away * (radius / length.clamp(min=1e-30)), z)


def rms(x: Tensor) -> Tensor:
    """The root mean square of each sample, shaped to multiply x (B, ...)."""
    return x.square().flatten(1).mean(dim=1).sqrt().view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Objective:
    """L for one batch of samples."""

    settings: NoiseSettings
    model: LatentModel
    reward: WeightedSum
    watched: Any  # a reward that is not optimised, or None
    prompts: list[str]
    equipped: Equipped  # the guidance method with all that it needs
    conds: Mapping[str, Cond]
    unknowns: Unknowns
    fixed: list[Tensor] | None  # what a stochastic sampler adds: drawn once, else the objective is random
    levels: list[Noise]
    scale: float  # of unit noise, as the pipeline starts
    plan: Plan

    def evaluate(self, z: Tensor, rows: Tensor, backward: bool, where: str) -> Evaluated:
        """L of z (A, D), the samples `rows` (A,), and its gradient if asked for; `where` begins an error's sentence."""
        parts = zip(z.split(self.plan.micro_batch), rows.split(self.plan.micro_batch), strict=True)
        with frozen(self.model.pipe), self.plan.applied(self.model.network, self.model.pipe.vae):
            found = [self._evaluate(part, index, backward, where) for part, index in parts]
        gradients = [e.gradient for e in found if e.gradient is not None]
        return Evaluated(
            torch.cat([e.images for e in found]),
            joined([e.record for e in found]),
            torch.cat([e.loss for e in found]),
            torch.cat(gradients) if gradients else None,
        )

    def _evaluate(self, z: Tensor, rows: Tensor, backward: bool, where: str) -> Evaluated:
        z, prompts = z.detach().requires_grad_(backward), [self.prompts[i] for i in rows.tolist()]
        with torch.set_grad_enabled(backward):
            with unchecked_gradients():  # what is not finite is one sample's, and is refused or leaves by itself
                images = self.images(z, rows)
            parts = {name: reward(images, prompts) for name, reward in self.reward.rewards.items()}
            total = self.reward.total(parts)
            away = REGULARIZERS[self.settings.regularizer](self.unknowns.noise_of(z, rows))
            loss = self.settings.regularization_weight * away - total.to(away)
            gradient = self._gradient(loss.sum(), z, where) if backward else None
        norm = torch.zeros(len(z)) if gradient is None else gradient.norm(dim=1).cpu()
        recorded = {name: scores.detach().cpu() for name, scores in parts.items()}
        record = Iteration(recorded, total.detach().cpu(), away.detach().cpu(), norm, self._watched(images, prompts))
        return Evaluated(images.detach(), record, loss.detach(), gradient)

    @torch.no_grad()
    def _watched(self, images: Tensor, prompts: Sequence[str]) -> Tensor | None:
        return None if self.watched is None else self.watched(images.detach(), prompts).detach().cpu()

    def _gradient(self, loss: Tensor, z: Tensor, where: str) -> Tensor:
        try:
            return torch.autograd.grad(loss, z)[0]
        except FloatingPointError as error:  # a run that is watched, or an inverse that misses its start
            raise RunError(f"{where}: {error}") from error

    def refuse_not_finite(self, record: Iteration, z: Tensor, rows: Tensor, where: str) -> None:
        """RunError, naming the reward, or the prompt and the step of the gradient, if a number of z's is not finite.

        The gradient is taken once more, of that sample alone and watched, to find the step.
        """
        prompts = [self.prompts[i] for i in rows.tolist()]
        for name, scores in record.parts.items():
            try:
                checked(scores, name, prompts)
            except ValueError as error:
                raise RunError(f"{where}: {error}") from error
        if not record.grad_norm.isfinite().all():
            first = int(record.grad_norm.isfinite().int().argmin())
            with watch_gradients(lambda index, norm: None):
                self.evaluate(z[[first]], rows[[first]], True, f"{where}, {prompts[first]!r}")
            raise RunError(f"{where}: the gradient of the noise for {prompts[first]!r} is not finite")

    def images(self, z: Tensor, rows: Tensor) -> Tensor:
        """(A, 3, H, W) in [0, 1], differentiable in z (A, D)."""
        step, gradient = sampler_named(self.settings.sampler), self.plan.gradient
        fixed = None if self.fixed is None else [noise[rows] for noise in self.fixed]
        x = self.scale * self.unknowns.noise_of(z, rows)
        with moving(self.settings.offload, x.device, gradient):
            path = rollout(step_of(gradient, step), self.predict(z, rows), x, self.levels, gradient, fixed)
        return self.model.decode(path.x, checkpointed=True)

    @cached_property
    def every(self) -> GuidedPredict:
        """The guided denoiser of all samples: the networks and their clock are looked up once for all iterations."""
        return guided_by(self.model, self.equipped, self.prompts, self.conds)

    def predict(self, z: Tensor, rows: Tensor) -> GuidedPredict:
        """The guided denoiser under the conditions of the samples `rows`, with the embedding that z says."""
        conds = {branch: {key: value[rows] for key, value in cond.items()} for branch, cond in self.conds.items()}
        if self.unknowns.of != "noise":
            conds["cond"] = {**conds["cond"], EMBEDDING: self.unknowns.embedding_of(z, rows)}
        method = self.equipped.method([self.prompts[i] for i in rows.tolist()])
        return replace(self.every, guidance=method, conds=conds, counter=Counter())

    def planned(self) -> Plan:
        """The plan for the memory budget, from one step for the first sample."""
        settings, steps = self.settings, len(self.levels) - 1
        bound = bound_mode(settings.gradient, settings.offload)
        first = torch.zeros(1, dtype=torch.long, device=self.unknowns.noise.device)
        z = self.unknowns.start()[:1]
        fixed = None if self.fixed is None else [noise[first] for noise in self.fixed]

        def measure(limit: int | None) -> Probe:
            with frozen(self.model.pipe):
                return probe(
                    probe_step(bound, sampler_named(settings.sampler)),
                    self.predict(z, first),
                    self.unknowns.noise_of(z, first),
                    self.levels,
                    fixed,
                    network=self.model.network,
                    decode=partial(self.model.decode, checkpointed=True),
                    decoder=self.model.pipe.vae,
                    rewards=scores_of(self.reward, self.prompts[:1]),
                    held=held(self.model, 0) + self._results(),
                    limit=limit,
                )

        return plan_for(settings.memory_budget, bound, steps, self.plan.batch, settings.decode_batch, measure)

    def _results(self) -> int:
        """Bytes of z, what its optimiser keeps of it, and of the first, the best and the present images."""
        height, width = self.model.size(self.settings.height, self.settings.width)
        copies = 14 + self.settings.copies
        return copies * self.unknowns.start().nbytes + 10 * len(self.prompts) * 3 * height * width * 4


def joined(records: Sequence[Iteration]) -> Iteration:
    """The records of the parts of a batch, joined to one."""
    parts = {name: torch.cat([record.parts[name] for record in records]) for name in records[0].parts}
    rest = [None if column[0] is None else torch.cat(column) for column in list(zip(*records, strict=True))[1:]]
    return Iteration(parts, *rest)  # type: ignore[arg-type]


def embeddings(conds: Mapping[str, Cond], like: Tensor) -> Tensor:
    """The prompts' embedding (B, L, E), in float32 or better."""
    return widen(conds["cond"][EMBEDDING]).to(like.device)
