"""A LoRA that moves the noise and not the model, as `train hypernoise` makes it: `difftune sample --noise_lora DIR`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from difftune.configs.written import CONFIG
from difftune.errors import UserError
from difftune.files.text import read_text
from difftune.pipelines import lora
from difftune.pipelines.opened import open_pipeline
from difftune.pipelines.texts import Texts
from solvers.denoiser import Cond, widen
from solvers.latent import LatentModel, NetworkDenoiser
from solvers.noise import Noise


def noise_shift(trained: NetworkDenoiser, base: NetworkDenoiser, x: Tensor, at: Noise, cond: Cond) -> Tensor:
    """f (B, ...): the trained network's output at x less the base's, in float32 or better; 0 where they are equal."""
    with torch.no_grad():
        before = network_output(base, x, at, cond)
    return network_output(trained, x, at, cond) - before


def network_output(denoiser: NetworkDenoiser, x: Tensor, at: Noise, cond: Cond) -> Tensor:
    """What the network emits at x (B, C, h, w), as it comes, in float32 or better."""
    x, at = denoiser.own(x, at)
    dtype = denoiser.dtype
    cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
    assert denoiser.family.call is not None  # LatentModel refuses a family without
    return widen(denoiser.family.call(denoiser.network, x.to(dtype), denoiser.clock(at), cond))


@torch.no_grad()
def moved_noises(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 16,
    embedded_guidance: float | None = None,
) -> Tensor:
    """The noises (N, C, h, w) of the seeds, each moved for its prompt by the adapter of the pipeline.

    steps: of the sampler that will draw from them, whose first level is the one at which the noise is seen.
    embedded_guidance: the scale told to a network distilled over scales, as it was in training.
    """
    model, network, moved = LatentModel(pipe, embedded_guidance), lora.network_of(pipe), list[Tensor]()
    texts = Texts()
    levels = model.levels(steps)
    scale = model.start_scale(levels)
    base = replace(model.denoiser, network=WithoutAdapter(network))
    for first in range(0, len(prompts), batch_size):
        some = slice(first, first + batch_size)
        z = model.noise(len(prompts[some]), [torch.Generator().manual_seed(seed) for seed in seeds[some]])
        cond = texts(model, prompts[some])["cond"]
        moved.append(z + noise_shift(model.denoiser, base, scale * z, levels[0], cond))
    return torch.cat(moved)


def moved_by(folder: str, model: str, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
    """`moved_noises` by the LoRA of a training run's folder, of the named model. UserError if there is none."""
    if not Path(folder, lora.WEIGHTS).is_file():
        raise UserError(f"--noise_lora {folder} holds no {lora.WEIGHTS}: give the --output_dir of train hypernoise")
    told = scale_told(Path(folder))
    return moved_noises(open_pipeline(model, folder), prompts, seeds, steps, embedded_guidance=told)


def scale_told(folder: Path) -> float | None:
    """The `embedded_guidance` of a run, by its folder or by that of one of its checkpoints; None if it had none, or if
    its settings are not there. UserError for settings that cannot be read."""
    file = next((place / CONFIG for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
    if file is None:
        return None
    try:
        told = yaml.safe_load(read_text(file, "the settings of")).get("embedded_guidance")
        return None if told is None else float(told)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read the settings of --noise_lora in {file}: give the --output_dir of a run"
        ) from error


class WithoutAdapter:
    """A network whose adapters are off in each call."""

    def __init__(self, network: Any):
        self.network, self.config, self.dtype = network, network.config, network.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with lora.off(self.network):
            return self.network(*args, **kwargs)
