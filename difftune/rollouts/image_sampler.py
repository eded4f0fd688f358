"""The sampler of a recipe: images of prompts and numbered noise, under its guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difftune.configs.training import TrainingConfig
from difftune.files.prompts import Prompts
from difftune.lookup import method_of, sampler_named
from difftune.pipelines.engine import moving, step_of, wants_noise
from difftune.pipelines.method_parts import trainable
from difftune.pipelines.texts import Texts
from difftune.rollouts.file_latents import FileLatents
from difftune.training.network import TrainedNetwork
from difftune.training.numbering import seed_of
from guidance.contract import Guidance
from guidance.guided import GuidedPredict, guided
from solvers.denoiser import Cond, Path
from solvers.latent import LatentModel, NetworkDenoiser
from solvers.noise import Noise
from solvers.rollout.modes import rollout
from solvers.samplers.catalogue import Step, gaussian


class Start(NamedTuple):
    """Samples before their first step."""

    prompts: list[str]
    x: Tensor  # (B, C, h, w), their initial latents
    noise: list[Tensor] | None  # of each step of a stochastic sampler
    predict: GuidedPredict  # the guided network, bound to the prompts


class Drawn(NamedTuple):
    """Samples that have come to the end of their run."""

    path: Path
    prompts: list[str]
    conds: Mapping[str, Cond]


@dataclass(frozen=True)
class ImageSampler:
    """Samples images of prompts and noise, differentiable in the network's weights."""

    model: LatentModel
    denoiser: NetworkDenoiser
    guidance: Guidance
    step: Step
    levels: Sequence[Noise]
    seed: int
    offload: bool = False  # the latents of a run that wait for its backward pass
    others: Mapping[str, NetworkDenoiser] = field(default_factory=dict)  # that the method evaluates beside the network
    texts: Texts = field(default_factory=Texts, repr=False, compare=False)
    files: FileLatents = field(default_factory=FileLatents, repr=False, compare=False)

    @classmethod
    def of(cls, config: TrainingConfig, pipe: Any, network: TrainedNetwork) -> "ImageSampler":
        """The sampler that config names, of the pipeline with `network` as its denoiser."""
        told = (config.embedded_guidance, config.decode_batch, config.enable_vae_tiling, config.num_frames)
        model = LatentModel(pipe, *told)
        named = method_of(config)
        guidance, networks = trainable(pipe, named)
        denoiser = replace(model.denoiser, network=network)
        others = {name: replace(denoiser, network=weak) for name, weak in networks.items()}
        levels = model.levels(config.num_inference_steps)
        return cls(model, denoiser, guidance, sampler_named(config.sampler), levels, config.seed, others=others)

    def with_network(self, network: TrainedNetwork) -> "ImageSampler":
        """The same sampler with another network as its denoiser."""
        return replace(self, denoiser=replace(self.denoiser, network=network))

    def __call__(self, prompts: Prompts, numbers: Sequence[int], gradient: str) -> tuple[Tensor, list[str]]:
        """Images (B, 3, H, W) in [0, 1] and their prompts. A sample's noise depends on seed and number alone."""
        drawn = self.draw(prompts, numbers, gradient)
        return self.decode(drawn), drawn.prompts

    def begin(self, prompts: Prompts, numbers: Sequence[int], gradient: str | None = None) -> Start:
        """Prompts, noise and the guided network of numbered samples."""
        texts = [prompts(i) for i in numbers]
        generators = [torch.Generator().manual_seed(seed_of(self.seed, i)) for i in numbers]
        with torch.no_grad():
            conds = self.texts(self.model, texts)
            x = self.model.start_scale(self.levels) * self.model.noise(len(texts), generators)
            drawn, steps = wants_noise(gradient, self.step), len(self.levels) - 1
            noise = [gaussian(x, generators) for _ in range(steps)] if drawn else None
        return Start(texts, x, noise, self.predict(conds))

    def draw(self, prompts: Prompts, numbers: Sequence[int], gradient: str) -> Drawn:
        """The ends of the samples' runs, connected to the network's weights as the engine's mode has it."""
        start = self.begin(prompts, numbers, gradient)
        with moving(self.offload, start.x.device, gradient):
            path = rollout(step_of(gradient, self.step), start.predict, start.x, self.levels, gradient, start.noise)
        copies = len(path.x) // len(start.x)  # draft_lv's, copy after copy
        return Drawn(path, start.prompts * copies, start.predict.conds)

    def decode(self, drawn: Drawn) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; the way back computes the decoder again."""
        return self.model.decode(drawn.path.x, checkpointed=True)

    @torch.no_grad()
    def latents(self, start: Start) -> Tensor:
        """The latents (B, C, h, w) at the samples' end, without a gradient."""
        return rollout(self.step, start.predict, start.x, self.levels, "full", start.noise).x

    def predict(self, conds: Mapping[str, Cond]) -> GuidedPredict:
        """The guided network under these conditions."""
        predict = guided(self.denoiser, self.guidance, conds)
        return replace(predict, networks={**predict.networks, **self.others})
