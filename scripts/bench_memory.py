"""The memory of an AlignProp step at Stable Diffusion 1.5's size, counted without computing it: no GPU is needed.

    python scripts/bench_memory.py [--batch 4] [--small]

The weights are torch's fake tensors, which have shapes and dtypes alone, and so is all that is computed from them: a
picture of 512 pixels costs no more to count than one of 64. As in a step of alignprop, images are drawn, decoded one at
a time and judged, and their gradient goes back to a LoRA of rank 4: 512 x 512, bfloat16, CFG 7.5, each of the sampler's
steps recomputed on the way back. The reward is a mean of the pixels, and there is no update. Two sampler steps are
taken; each further one keeps its latents, 64 KiB an image. Given are the most bytes of tensors at once, beside the
weights. An operator's own scratch, and what an allocator keeps beyond its tensors, are not seen.

The rows: the whole batch at once, half of it and one image at a time, as a memory budget splits it, and all at once
with the network's blocks recomputed; then decoding of one image and of eight, with the way back from their mean.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench_models import sd15
from benching import heading, row
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from difftune.configs.recipes import AlignPropConfig
from difftune.files.prompts import prompts_named
from difftune.recipes import recipe_of
from difftune.rollouts.session import Session, open_session
from rewards.simple import Brightness
from solvers.memory.budget import parameters_bytes
from solvers.memory.checkpointing import block_checkpointing
from solvers.memory.live import LiveBytes

# ------------------------------------------------------------------------------------------------ without contents


@contextmanager
def session_of(pipe: Any, precision: str = "no") -> Iterator[Session[AlignPropConfig]]:
    """What `train` hands to AlignProp, for two steps of the sampler."""
    config = AlignPropConfig(prompts="animals", num_inference_steps=2, guidance_scale=7.5, mixed_precision=precision)
    prompts = prompts_named(config.prompts, config.seed)
    reference = recipe_of(config).wants_reference(config)
    with open_session(config, None, pipe, prompts, Brightness(), reference, lambda line: None) as session:
        session.images.model.network.train()
        yield session


def unfilled() -> Any:
    """Stable Diffusion 1.5's size in bfloat16, whose weights are whatever the memory holds."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pipe = sd15("meta")
    finally:
        torch.set_default_dtype(before)
    for model in models_of(pipe):
        model.to_empty(device="cpu")
    return pipe


def models_of(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def forget(pipe: Any) -> None:
    """From now on the weights of its models, and all that is computed from one, have no contents."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in (module for model in models_of(pipe) for module in model.modules()):
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(t) for name, t in tensors.items() if t is not None})


# ------------------------------------------------------------------------------------------------ counted


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes of tensors that a run makes, at once."""
    with LiveBytes() as live:
        run()
    return live.peak


def take(session: Session[AlignPropConfig], batch: int, at_once: int) -> None:
    """The images of a batch, their rewards and the way back, `at_once` at a time."""
    for first in range(0, batch, at_once):
        drawn = session.images.draw(session.prompts, range(first, min(first + at_once, batch)), "checkpoint")
        scored(session.images.decode(drawn)).sum().backward()
    session.images.model.network.zero_grad()


def scored(images: Tensor) -> Tensor:
    """Brightness, without its checks of the images' contents."""
    return images.float().mean((1, 2, 3))


def judge(session: Session[AlignPropConfig], batch: int) -> None:
    """A batch decoded, the mean of its pixels, and the way back to its latents."""
    latents = torch.zeros(batch, *session.images.model.shape(), requires_grad=True)
    scored(session.images.model.decode(latents, checkpointed=True)).sum().backward()


def rows(session: Session[AlignPropConfig], batch: int) -> Iterator[tuple[str, int]]:
    """What is counted, and its bytes."""
    for at_once in sorted({batch, -(-batch // 2), 1}, reverse=True):
        yield f"a step of {batch} images, {at_once} at a time", peak_of(lambda: take(session, batch, at_once))  # noqa: B023
    with block_checkpointing(session.images.model.network):
        yield f"a step of {batch} images, blocks recomputed", peak_of(lambda: take(session, batch, batch))
    for images in (1, 8):
        yield f"decoding {images} and the mean of the pixels", peak_of(lambda: judge(session, images))  # noqa: B023


def main(batch: int, small: bool) -> None:
    pipe = sd15("cpu", small=True) if small else unfilled()
    with session_of(pipe, "no" if small else "bf16") as session:
        print(f"{parameters_bytes(*models_of(pipe)) / 1e9:.2f} GB of weights\n")
        forget(pipe)
        print(heading(["what", "peak beside the weights, GB"]), flush=True)
        for what, size in rows(session, batch):
            print(row([what, f"{size / 1e9:.4g}"]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--small", action="store_true", help="two thin levels in place of four: whether it works")
    main(**vars(parser.parse_args()))
