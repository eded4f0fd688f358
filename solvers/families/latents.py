"""How the latents of a family stand to what its VAE encodes and decodes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from solvers.denoiser import widen

Statistics = tuple[Tensor | float, Tensor | float, float]


def of_config(vae: Any, z: Tensor) -> Statistics:
    """(mean, std, scale) of the VAE's config, for each channel where it has them so."""
    config = vae.config
    mean, std, scale = config.get("latents_mean"), config.get("latents_std"), config.get("scaling_factor") or 1.0
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, 1.0, scale
    shape = (1, -1, *[1] * (z.ndim - 2))
    return widen(z).new_tensor(mean).view(shape), widen(z).new_tensor(std).view(shape), scale


def of_batch_norm(vae: Any, z: Tensor) -> Statistics:
    """The statistics that a batch norm of FLUX.2's VAE holds for each channel of a patch."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return (*(value.to(widen(z)).view(1, -1, 1, 1) for value in (vae.bn.running_mean, std)), 1.0)


@dataclass(frozen=True)
class Latents:
    """Latents x (B, C, h, w) of a family: z = x std / scale + mean is what the VAE decodes, in patches of `patch` x
    `patch` that are channels of x.

    film: the VAE's own are of films, and x is the only frame of one, or, with `frames`, a film itself (B, C, T, h, w).
    """

    channels: Callable[[Any], int] = lambda vae: vae.config.latent_channels
    patch: int = 1
    statistics: Callable[[Any, Tensor], Statistics] = of_config
    film: bool = False
    frames: bool = False

    def to_vae(self, vae: Any, x: Tensor) -> Tensor:
        """What the VAE decodes, in float32 or better."""
        mean, std, scale = self.statistics(vae, x)
        z = widen(x) * std / scale + mean
        z = F.pixel_shuffle(z, self.patch) if self.patch > 1 else z
        return self.filmed(z)

    def from_vae(self, vae: Any, z: Tensor) -> Tensor:
        """`to_vae` undone."""
        z = z[:, :, 0] if self.film and not self.frames else z
        x = F.pixel_unshuffle(z, self.patch) if self.patch > 1 else z
        mean, std, scale = self.statistics(vae, x)
        return (widen(x) - mean) * scale / std

    def filmed(self, x: Tensor) -> Tensor:
        """Pictures or latents (B, C, H, W) as the VAE has them: with an axis of frames, if it is one of films."""
        return x[:, :, None] if self.film and x.ndim == 4 else x

    def pictures(self, pixels: Tensor) -> Tensor:
        """What the VAE gives, (B, 3, H, W), or (B, 3, F, H, W) if there are several frames."""
        return pixels[:, :, 0] if self.film and pixels.shape[2] == 1 else pixels
