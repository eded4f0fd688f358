"""ReNO: optimise the initial noise of a picture on a reward, at inference (https://arxiv.org/abs/2406.04312).

    minimise over eps   -sum_i w_i R_i(decode(sample(eps, c)), c) + gamma K(eps),

where K is minus the log density of |eps|, which is chi-distributed for Gaussian noise: it keeps the noise on the shell
where the network has seen noise.

    best = ReNO(pipe, reward={"tiny-clip": 1.0}).optimize(["a red circle left of a blue square"], iterations=50)
    best.images, best.noises, best.rewards, best.history
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from difftune.errors import UserError
from difftune.files.checkpoint import State, going_on
from difftune.lookup import Rewards, at_least, reward_named, reward_weights, sampler_named
from difftune.pipelines.engine import one_at_a_time, wants_noise
from difftune.pipelines.method_parts import equip, guided_by
from difftune.pipelines.texts import Texts
from difftune.reno.named import needs_gradient, sized
from difftune.reno.objective import Iteration, Objective, Unknowns, embeddings
from difftune.reno.paper import levels_at, setting_of
from difftune.reno.progress import Progress, beginning, chosen, of_state
from difftune.reno.results import START, Live, Result, result
from difftune.reno.settings import NoiseSettings
from difftune.reno.zero_order import ranked, started
from guidance.invert import invert
from guidance.methods.catalogue import Plain
from rewards.compose import scaled_sum
from solvers.families.table import family_of
from solvers.latent import Generators, LatentModel
from solvers.memory.budget import Plan
from solvers.noise import Noise
from solvers.samplers.catalogue import gaussian


@dataclass(frozen=True)
class ReNO(NoiseSettings):
    """Noise optimisation on a diffusers pipeline, which is left as it was.

    reward: weights by name, or a reward. held_out: a reward that is watched beside it and not optimised, and so needs
    no gradient. All other fields are those of `NoiseSettings`, given by keyword.

    Raises UserError for what is unknown, and for a reward without a gradient under an optimiser that needs it.
    """

    pipe: Any
    reward: Rewards
    held_out: Rewards | None = None
    progress: bool = True  # show a progress bar
    texts: Texts = field(default_factory=Texts, repr=False, compare=False)  # the prompts that were encoded

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.pipe, str):
            family_of(self.pipe)  # which says how a model is loaded
        if needs_gradient(self.update):
            reward_weights(self.reward, gradient=True)

    def optimize(
        self,
        prompts: str | Sequence[str],
        iterations: int = 50,
        seed: int = 0,
        generator: Generators = None,
        seeds_per_prompt: int = 1,
        start: Tensor | None = None,
        state: State | None = None,
    ) -> Result:
        """The best of `iterations` images for each sample; the first is that of the initial noise, so none gets worse.

        Samples are the prompts, each `seeds_per_prompt` times in a row; the i-th one's noise is drawn with seed + i,
        whatever the batch. `generator` (one, or one per sample) replaces that, and `start` (B or 1, C, h, w) the noise.
        `state` goes on from a `Live.state` of the same call. Raises RunError if the first reward or gradient is not
        finite; a sample that becomes so later leaves the batch with what it has.
        """
        objective, seeds = self._objective(prompts, iterations, seed, generator, seeds_per_prompt, start)
        progress = self._progress(objective, seeds, state)
        steps = self._iterate(objective, iterations, progress)
        for live in tqdm(steps, "ReNO", iterations, initial=progress.iteration, disable=not self.progress):
            progress = live.progress
        return result(objective, progress)

    def iterate(
        self,
        prompts: str | Sequence[str],
        iterations: int = 50,
        seed: int = 0,
        generator: Generators = None,
        seeds_per_prompt: int = 1,
        start: Tensor | None = None,
        state: State | None = None,
    ) -> Iterator[Live]:
        """Each iteration as it is made: image and reward of the present noise; the noise moves on in between."""
        objective, seeds = self._objective(prompts, iterations, seed, generator, seeds_per_prompt, start)
        yield from self._iterate(objective, iterations, self._progress(objective, seeds, state))

    def planned(self, prompts: str | Sequence[str], seeds_per_prompt: int = 1) -> Plan:
        """The engine's plan for these prompts; measured if there is a memory budget."""
        return self._objective(prompts, 1, 0, None, seeds_per_prompt, None)[0].plan

    @torch.no_grad()
    def inverted(self, images: Tensor, prompts: str | Sequence[str], num_inference_steps: int = 50) -> Tensor:
        """The noises (B, C, h, w) of images (B, 3, H, W) in [0, 1], as far as DDIM's inversion can tell, for `start`.

        Under `guidance`, of which CFGpp inverts best (https://arxiv.org/abs/2406.08070).
        """
        model = LatentModel(self.pipe, self.embedded_guidance)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        conds = self.texts(model, texts, *images.shape[2:])
        predict = guided_by(model, equip(self.pipe, self.guidance or Plain()), texts, conds)
        levels = model.levels(num_inference_steps, *images.shape[2:])
        x = invert(predict, model.encode_images(images.to(model.device)), levels).x
        return x / model.start_scale(levels)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width: as given, or the paper's, or None for the pipeline's own."""
        paper = setting_of(self.pipe, self.setting)
        side = paper.size if paper else None
        return self.height or side, self.width or side

    # -------------------------------------------------------------------------------------------- the loop

    def _iterate(self, objective: Objective, iterations: int, progress: Progress) -> Iterator[Live]:
        paper = setting_of(self.pipe, self.setting)
        optimizer = sized(self.update, paper, objective.unknowns.dimension)
        walk = self._descend if needs_gradient(optimizer) else self._search
        yield from walk(objective, optimizer, iterations, progress)

    def _descend(self, objective: Objective, optimizer: Any, iterations: int, progress: Progress) -> Iterator[Live]:
        """Follow the gradient: evaluate, keep the best, move."""
        memory = optimizer.start(progress.z)
        if progress.iteration and memory.keys() != progress.memory.keys():
            raise self._of_another()
        progress = progress if progress.iteration else replace(progress, memory=memory)
        while progress.iteration < iterations and progress.active.any():
            if progress.pending:  # the evaluation that ended an earlier, shorter run needed no gradient
                progress = self._moved(objective, optimizer, progress, self._evaluated(objective, progress, True))
            moves = progress.iteration < iterations - 1
            rows, found = progress.rows, self._evaluated(objective, progress, moves)
            refused(found.record, objective, progress.z[rows], rows, progress)
            progress = progress.seen(found, progress.z[rows], rows, torch.ones_like(rows))
            live, progress = self._live(objective, progress), replace(progress, pending=True)
            if moves:
                progress = self._moved(objective, optimizer, progress, chosen(found, progress.active[rows]))
            yield live._replace(progress=progress)

    def _evaluated(self, objective: Objective, progress: Progress, backward: bool) -> Any:
        rows = progress.rows
        return objective.evaluate(progress.z[rows], rows, backward, f"iteration {progress.iteration + 1}")

    def _moved(self, objective: Objective, optimizer: Any, progress: Progress, found: Any) -> Progress:
        """The active samples, moved by what was found of them."""
        rows = progress.rows
        memory = {key: value[rows] for key, value in progress.memory.items()}
        z, memory = optimizer.step(progress.z[rows], found.loss, found.gradient, memory)
        z = objective.unknowns.within(z, rows, self.max_distance)
        return progress.moved(z, memory, rows)

    def _search(self, objective: Objective, optimizer: Any, iterations: int, progress: Progress) -> Iterator[Live]:
        """Search by rewards alone: evaluate the candidates of each sample, keep the best, ask for the next."""
        if len(progress.told) != progress.iteration:
            raise self._of_another()
        every = progress.rows.tolist()
        begun = {i: started(optimizer, progress.z[i], progress.seeds[i], progress.heard(i)) for i in every}
        while progress.iteration < iterations and progress.active.any():
            rows = progress.rows.tolist()
            progress, values = self._heard(objective, progress, torch.stack([begun[i][1] for i in rows]))
            live = self._live(objective, progress)
            for i, heard in zip(rows, values, strict=True):
                if progress.active[i]:
                    begun[i] = (begun[i][0], begun[i][0].send(heard))
            yield live

    def _heard(self, objective: Objective, progress: Progress, asked: Tensor) -> tuple[Progress, Tensor]:
        """The progress after evaluating the candidates (A, N, D), with each sample's best; and all values (A, N)."""
        rows, size = progress.rows, asked.shape[1]
        each = rows.repeat_interleave(size)
        z = objective.unknowns.within(asked.flatten(0, 1), each, self.max_distance)
        found = objective.evaluate(z, each, False, f"iteration {progress.iteration + 1}")
        refused(found.record, objective, z, each, progress)
        totals = found.record.total.nan_to_num(-torch.inf, -torch.inf, -torch.inf).view(-1, size)
        place = (torch.arange(len(rows)) * size + totals.argmax(dim=1)).to(z.device)
        values = torch.stack([ranked(row) for row in -found.loss.view(-1, size)])
        progress = progress.told_of(values, rows)
        return progress.seen(chosen(found, place), z[place], rows, torch.full_like(rows, size)), values

    def _of_another(self) -> UserError:
        return UserError(f"the state is not of optimizer {self.optimizer}: resume with the one that made it")

    def _live(self, objective: Objective, progress: Progress) -> Live:
        every = torch.arange(len(progress.z), device=progress.z.device)
        noises = objective.unknowns.noise_of(progress.made.now.z, every)
        images, record = progress.made.now.images.clone(), progress.history[-1]
        return Live(progress.iteration - 1, images, noises.clone(), record, progress, objective)

    # -------------------------------------------------------------------------------------------- the beginning

    def _objective(
        self,
        prompts: str | Sequence[str],
        iterations: int,
        seed: int,
        generator: Generators,
        seeds_per_prompt: int,
        start: Tensor | None,
    ) -> tuple[Objective, list[int]]:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [text for text in texts for _ in range(seeds_per_prompt)]
        at_least(1, iterations=iterations, seeds_per_prompt=seeds_per_prompt)
        if not texts:
            raise UserError("the list of prompts is empty: give at least one")
        seeds = [seed + i for i in range(len(texts))]
        height, width = self.size
        own = replace(self, height=height, width=width)
        return own._made(texts, generator or [fresh(s) for s in seeds], start), seeds

    @torch.no_grad()
    def _made(self, prompts: list[str], generator: Generators, start: Tensor | None) -> Objective:
        model = LatentModel(self.pipe, self.embedded_guidance, self.decode_batch, self.enable_vae_tiling)
        conds = self.texts(model, prompts, self.height, self.width)
        noise = model.noise(len(prompts), generator, self.height, self.width)
        levels = self.levels(model)
        scale = model.start_scale(levels)
        drawn = wants_noise(self.gradient, sampler_named(self.sampler))
        fixed = [gaussian(noise, generator) for _ in levels[1:]] if drawn else None
        if start is not None:
            noise = started_at(start, noise)
        unknowns = Unknowns(self.variables, noise, embeddings(conds, noise))
        reward = scaled_sum(reward_named(self.reward, gradient=False), self.reward_scaling)
        watched = None if self.held_out is None else reward_named(self.held_out, gradient=False)
        batch = len(prompts) * self.candidates
        whole = Plan(self.gradient or "checkpoint", batch, batch, decode_batch=self.decode_batch)
        equipped = equip(self.pipe, self.guidance or Plain())
        objective = Objective(
            self, model, reward, watched, prompts, equipped, conds, unknowns, fixed, levels, scale, whole
        )
        with torch.enable_grad():
            plan = objective.planned()
        reward = one_at_a_time(reward, plan) if needs_gradient(self.update) else reward
        return replace(objective, model=replace(model, decode_batch=plan.decode_batch), plan=plan, reward=reward)

    def levels(self, model: LatentModel) -> list[Noise]:
        """The noise levels of a run: at the timesteps given or the paper's, or as the scheduler lays them out."""
        paper = setting_of(self.pipe, self.setting)
        timesteps = self.timesteps or (paper.timesteps if paper and self.num_inference_steps == 1 else None)
        if timesteps:
            return levels_at(self.pipe.scheduler, timesteps)
        return model.levels(self.num_inference_steps, self.height, self.width)

    def _progress(self, objective: Objective, seeds: Sequence[int], state: State | None) -> Progress:
        z = objective.unknowns.start()
        if state is None:
            return beginning(self, z, objective.prompts, seeds)
        with going_on():
            progress = of_state(state, self, z, objective.prompts, seeds)
            begun_with(state, objective.unknowns.noise)
        return progress


def refused(record: Iteration, objective: Objective, z: Tensor, rows: Tensor, progress: Progress) -> None:
    """RunError for what is not finite in the first iteration, after which there would be nothing to keep."""
    if progress.iteration == 0:
        objective.refuse_not_finite(record, z, rows, "iteration 1")


def begun_with(state: State, noise: Tensor) -> None:
    """UserError if the state's run began with another noise: distances to it, and what is drawn, would differ."""
    if not torch.equal(state.tensors[START], noise.cpu()):
        raise UserError("the state began with another noise: resume with the same start, or a generator as it was then")


def started_at(start: Tensor, noise: Tensor) -> Tensor:
    """The given noise, one for all or one per sample; UserError, naming the shapes, if it does not fit."""
    if start.shape[1:] != noise.shape[1:] or len(start) not in (1, len(noise)):
        raise UserError(
            f"the noise to start from is {tuple(start.shape)}: it must be {tuple(noise.shape)}, or one for all samples"
        )
    if not start.isfinite().all():
        raise UserError("the noise to start from is not finite: give another")
    return start.to(noise).expand_as(noise).clone()


def fresh(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
