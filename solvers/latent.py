"""A loaded diffusers pipeline as a denoiser, with the ways in and out of its latent space.

Everything is autograd-connected to latents, conditions and parameters; nothing here is under `no_grad`, and no module's
mode or `requires_grad` changes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from solvers.denoiser import Cond, Prediction, predicted, widen
from solvers.errors import UserError
from solvers.families.after import After
from solvers.families.family import Family
from solvers.families.prompts import caution_unread
from solvers.families.table import family_of
from solvers.levels import Clock, levels_of, prediction_type, start_scale
from solvers.modules import dtype_of, execution_device
from solvers.noise import Noise, normalised
from solvers.samplers.catalogue import Generators, unit_normal


class Expert(NamedTuple):
    """The network that serves at the low levels, below a timestep."""

    network: Any
    below: float


@dataclass(frozen=True)
class NetworkDenoiser:
    """A diffusers network as a Denoiser; `dataclasses.replace(denoiser, network=weak)` has another network.

    low: a second network for the low levels (Wan 2.2), which has the conditions and the dtype of the first.
    """

    network: Any
    family: Family
    clock: Clock
    prediction_type: str
    low: Expert | None = None

    def __call__(self, x: Tensor, at: Noise, cond: Cond) -> Prediction:
        """The prediction at x (B, C, h, w), whose level may be in any coordinates; float32 or better."""
        x, at = self.own(x, at)
        dtype = self.dtype
        cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
        assert self.family.call is not None  # LatentModel refuses a family without
        timestep = self.clock(at)
        out = self.family.call(self.serving(timestep), x.to(dtype), timestep, cond)
        return predicted(self.prediction_type, x, at, out)

    def serving(self, timestep: Tensor) -> Any:
        """The network that serves at a timestep."""
        return self.network if self.low is None or timestep >= self.low.below else self.low.network

    def own(self, x: Tensor, at: Noise) -> tuple[Tensor, Noise]:
        """(x, at) in the coordinates that the network was trained in: both divided by sqrt(alpha^2 + sigma^2), or by
        alpha + sigma for a flow. The same (x0, eps) explain both, since x = alpha x0 + sigma eps is homogeneous."""
        scale, own = normalised(self.prediction_type, at)
        return widen(x) / scale, own

    @property
    def after(self) -> After | None:
        """What its pipeline does to every guided prediction, whatever it is called with."""
        return self.family.after if self.family.after and self.family.after.always else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in; diffusers walks through all its modules to tell."""
        return dtype_of(self.network)

    def one_run(self) -> "NetworkDenoiser":
        """The same for one run, which reads the network's dtype once."""
        return _OneRun(self.network, self.family, self.clock, self.prediction_type, self.low)

    @property
    def networks(self) -> list[Any]:
        return [self.network] if self.low is None else [self.network, self.low.network]

    def parameters(self) -> Iterable[nn.Parameter]:
        return chain.from_iterable(network.parameters() for network in self.networks)

    def patched(self, name: str) -> AbstractContextManager[Any]:
        """A context in which the network runs with a named change; ValueError, listing the known, for another name."""
        return _together([self.family.patched(network, name) for network in self.networks])


class _OneRun(NetworkDenoiser):
    """Within a run a network keeps its dtype. A copy, also with another network, reads it anew."""

    @cached_property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return dtype_of(self.network)


@dataclass(frozen=True)
class LatentModel:
    """A pipeline of `FAMILIES`. Components are read anew at each use, so a replaced scheduler or network is followed.

    `embedded_guidance` is the guidance scale told to a network distilled over scales (LCM, FLUX.1 dev); no other takes
    one. `decode_batch` images are decoded at a time, so that the decoder's memory does not grow with the batch; `tiled`
    decodes an image larger than the VAE's tile in overlapping tiles, whose seams are blended. `num_frames` is of a film
    (Wan), and one of a single frame is a picture.

    Raises ValueError for an unknown pipeline, a family that only `attach` knows, a pipeline with a ControlNet, a
    network that takes more than latents, and a VAE that is to use tiles and has none.
    """

    pipe: Any
    embedded_guidance: float | None = None
    decode_batch: int = 1
    tiled: bool = False
    num_frames: int = 1

    def __post_init__(self):
        if self.decode_batch < 1:
            raise UserError(
                f"decode_batch is {self.decode_batch}: give the images that are decoded at a time, 1 or more"
            )
        if self.tiled and ("use_tiling" not in vars(self.pipe.vae) or self.family.latents.film):  # a film's is stateful
            raise UserError(f"{_name(self.pipe.vae)} cannot decode in tiles: leave enable_vae_tiling out")
        if self.family.encode is None:
            raise UserError(f"LatentModel does not know {_name(self.pipe)} (family {self.family.name}); use attach")
        if "controlnet" in self.pipe.components:
            raise UserError(f"{_name(self.pipe)}: LatentModel would leave the ControlNet out; use attach")
        takes, has = self.network.config.in_channels, self.family.latents.channels(self.pipe.vae)
        if takes % has:
            raise UserError(f"the network takes {takes} channels, more than the latents' {has}; use attach")
        self.shape(frames=self.num_frames)

    @property
    def family(self) -> Family:
        return family_of(self.pipe)

    @property
    def network(self) -> Any:
        return getattr(self.pipe, self.family.denoisers[0])

    @property
    def denoiser(self) -> NetworkDenoiser:
        scheduler = self.pipe.scheduler
        return NetworkDenoiser(self.network, self.family, Clock(scheduler), prediction_type(scheduler), self._low)

    @property
    def _low(self) -> Expert | None:
        below = self.family.boundary(self.pipe)
        return None if below is None else Expert(getattr(self.pipe, self.family.denoisers[1]), below)

    @property
    def device(self) -> torch.device:
        """The device that the pipeline runs on, also under offloading."""
        return execution_device(self.pipe)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.network)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of the network."""
        return self.network.parameters()

    def levels(self, steps: int, height: int | None = None, width: int | None = None, **options: Any) -> list[Noise]:
        """The `steps + 1` levels of the pipeline's scheduler, as the pipeline lays them out for the image's size (FLUX
        and SD3 shift them by it); options, as in `levels_of`, win."""
        *_, rows, columns = self.shape(height, width)
        laid_out = self.family.options(self.pipe, (rows, columns), steps)
        return levels_of(self.pipe.scheduler, steps, **{**laid_out, **options})

    def start_scale(self, levels: Sequence[Noise]) -> float:
        """The factor of `noise` at the first level, as the pipeline starts: see `levels.start_scale`."""
        return start_scale(self.pipe.scheduler, levels)

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) of an image in pixels; the pipeline's own by default."""
        sample = self.family.size(self.network)
        rows, columns = (sample, sample) if isinstance(sample, int) else sample
        return height or rows * self.factor, width or columns * self.factor

    def shape(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> tuple[int, ...]:
        """(C, h, w) of the latents of a height x width image, or (C, T, h, w) of a film of `frames` (`num_frames` if
        None); ValueError unless the VAE's factor, times the side of the network's patches, divides both sides, and the
        VAE's factor in time the frames after the first."""
        height, width = self.size(height, width)
        multiple = self.factor * self.family.patch
        if height % multiple or width % multiple:
            raise UserError(f"{height} x {width} pixels: both must be multiples of {multiple}")
        sides = (height // self.factor, width // self.factor)
        return (self.family.latents.channels(self.pipe.vae), *self._times(frames or self.num_frames), *sides)

    def _times(self, frames: int) -> tuple[int, ...]:
        """(T,) of a film, () of a picture."""
        if not self.family.latents.frames:
            if frames != 1:
                raise UserError(f"{_name(self.pipe)} makes pictures: leave num_frames={frames} out")
            return ()
        each = self.pipe.vae_scale_factor_temporal
        if frames < 1 or (frames - 1) % each:
            raise UserError(f"num_frames is {frames}: give 1 more than a multiple of {each}, as in {4 * each + 1}")
        return (1 + (frames - 1) // each,)

    @property
    def factor(self) -> int:
        """Pixels along a side of one place of the latents."""
        return self.family.factor(self.pipe) * self.family.latents.patch

    def noise(
        self, batch: int, generator: Generators = None, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Unit normal latents (batch, C, h, w) in float32 or better, the numbers that the pipeline draws: in its dtype.

        ValueError unless `generator` is one generator, or a list with one per sample.
        """
        if isinstance(generator, Sequence):
            generator = list(generator)
            if len(generator) != batch:
                raise UserError(f"{len(generator)} generators for a batch of {batch}: pass one, or one per sample")
        shape = (batch, *self.shape(height, width))
        return widen(unit_normal(shape, generator, self.device, self.noise_dtype))

    @property
    def noise_dtype(self) -> torch.dtype:
        """The dtype that the pipeline draws its noise in."""
        return torch.float32 if self.family.draws_float32 else self.dtype

    def encode(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> dict[str, Cond]:
        """{"cond": Cond, "uncond": Cond} for B prompts; one negative prompt serves all of them.

        The image's size is a condition of some families (SDXL).
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * len(prompts)
        negatives = None if negative_prompts is None else list(negative_prompts)
        assert self.family.encode is not None
        caution_unread(self.pipe, prompts)
        return self.family.encode(self.pipe, prompts, negatives, self.size(height, width), self.embedded_guidance)

    def decode(self, latents: Tensor, checkpointed: bool = False) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], float32 or better, of latents (B, C, h, w); films of several frames are
        (B, 3, F, H, W).

        `checkpointed`: the backward pass recomputes the decoder instead of storing its activations, `decode_batch`
        images at a time (of a tiled image, tile by tile), and what it holds does not grow with the batch.
        """
        z = self.family.latents.to_vae(self.pipe.vae, latents)
        decode = partial(checkpoint, self._decode, use_reentrant=False) if checkpointed else self._decode
        images = [decode(part) for part in z.split(self.decode_batch)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), the mode of the VAE's posterior, of images (B, 3, H, W) in [0, 1]."""
        latents = self.family.latents
        return latents.from_vae(self.pipe.vae, widen(self._vae(_mode, latents.filmed(2 * images - 1))))

    def _decode(self, z: Tensor) -> Tensor:
        with _tiles(self.pipe.vae, again=not self._upcast) if self.tiled else nullcontext():
            pixels = self._vae(lambda vae, z: vae.decode(z, return_dict=False)[0], z)
        pixels = self.family.latents.pictures(pixels)
        return (widen(pixels) / 2 + 0.5).clamp(0, 1)

    def _vae(self, function: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        """function(vae, x) in the VAE's dtype, or in float32 where its float16 overflows (SDXL)."""
        vae = self.pipe.vae
        if self._upcast:
            weights = {f"vae.{name}": weight.float() for name, weight in vae.named_parameters()}
            return functional_call(_Holder(vae), weights, (function, x.float()))
        return function(vae, x.to(dtype_of(vae)))

    @property
    def _upcast(self) -> bool:
        """Whether the VAE runs in float32 because its float16 overflows."""
        vae = self.pipe.vae
        return self.family.upcast_vae and bool(vae.config.force_upcast) and dtype_of(vae) == torch.float16


@contextmanager
def _together(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def _tiles(vae: Any, again: bool) -> Iterator[None]:
    """Inside, the VAE decodes tile by tile. `again`: each tile is recomputed in the backward pass; not for weights that
    are lent to the VAE, which are gone by then."""
    before, own = vae.use_tiling, vars(vae.decoder).get("forward")
    vae.use_tiling, forward = True, vae.decoder.forward
    vae.decoder.forward = partial(checkpoint, forward, use_reentrant=False) if again else forward
    try:
        yield
    finally:
        vae.use_tiling = before
        del vae.decoder.forward
        if own is not None:
            vae.decoder.forward = own


def _name(pipe: Any) -> str:
    return type(pipe).__name__


def _mode(vae: Any, x: Tensor) -> Tensor:
    """The mode of the posterior; a VAE without one (Sana's) gives the latents themselves."""
    posterior = vae.encode(x, return_dict=False)[0]
    return posterior if isinstance(posterior, Tensor) else posterior.mode()


class _Holder(nn.Module):
    """A VAE whose methods run as a forward, with the parameters that `functional_call` lends it: a VAE moved to float32
    and back, as the pipeline does, would leave a backward pass with the wrong weights."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, function: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        return function(self.vae, x)
