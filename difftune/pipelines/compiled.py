"""`--compile`: the blocks of a pipeline's network and of its VAE's decoder, compiled by torch.

Blocks, and not whole networks: a graph serves all blocks of a kind and a shape, so that there is little to compile, and
what is done to a network from outside is done around its blocks: by `attach`, DDP, a patch of a guidance method, block
checkpointing, and a sampler's steps that are recomputed on the way back.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftune.errors import UserError
from difftune.pipelines.method_parts import networks_named
from difftune.processes import on_cpu
from guidance.contract import Guidance
from solvers.families.table import family_of
from solvers.rollout.recompute import unwatched

BACKEND = "inductor"
BLOCKS = {"ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "SanaTransformerBlock"}
GRAPHS = 256  # of one kind of block: its shapes, each with and without a gradient; torch gives up after 8

REFUSED = {  # settings that cannot be combined with it, and why
    "memory_budget": "a plan for a budget measures single operators, which a compiled block hides",
    "lora_anneal": "the LoRA's share is another one in each step, and each would be compiled anew",
    "enable_xformers_memory_efficient_attention": "torch compiles its own attention alone",
}


def check_compile(config: Any) -> None:
    """UserError, before anything is loaded, if `config` says compile, and torch cannot here, or not with its others."""
    settings = vars(config)
    if not settings["compile"]:
        return
    for name, why in REFUSED.items():
        if settings.get(name):
            raise UserError(f"--compile does not go with --{name}: {why}; leave one of them out")
    if reason := obstacle():
        raise UserError(reason)


def obstacle() -> str | None:
    """Why torch cannot compile here, in one sentence with the remedy; None if nothing is in its way."""
    if BACKEND != "inductor":
        return None
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    if shutil.which(compiler) is None:
        return f"--compile needs a C++ compiler, and there is no {compiler}: install it, or leave --compile out"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "--compile needs Python's headers, and there is no Python.h: install python3-dev, or leave --compile out"
    if not on_cpu() and util.find_spec("triton") is None:
        return "--compile needs triton on a GPU, and it is not installed: pip install triton, or leave --compile out"
    return None


@contextmanager
def compiled(
    pipe: Any,
    on: bool = True,
    dynamic: bool | None = False,
    guidance: Guidance | None = None,
    others: Sequence[Any] = (),
) -> Iterator[str | None]:
    """Within, the blocks of the pipeline's network and of its decoder run compiled; afterwards as before. So do those
    of the networks that a guidance method names, and of the networks of other pipelines (the experts of a search).

    A block is compiled when it is first called, and again for another shape, with and without a gradient, and for
    another adapter. A result agrees with that of the plain blocks up to rounding. dynamic: as for `torch.compile`; a
    call that is recomputed on the way back must find the graph that it had, so that False alone serves there.
    Given is a line on what is compiled; None if it is not `on`. Raises UserError for a network without blocks that are
    known to compile.
    """
    if not on:
        yield None
        return
    networks = [*networks_in(pipe), *beside(pipe, guidance), *chain.from_iterable(map(networks_in, others))]
    networks = list(dict.fromkeys(networks))  # an expert may be the pipeline itself
    blocks = [block for network in networks for block in blocks_of(network)]
    if plain := [network for network in networks if not blocks_of(network)]:
        raise UserError(f"{type(plain[0]).__name__} has no blocks that are known to compile: leave --compile out")
    decoding = blocks_of(pipe.vae.decoder)
    limits = torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=16 * GRAPHS)
    with limits, _by_torch([*blocks, *decoding], dynamic):
        of = "the network" if len(networks) == 1 else f"{len(networks)} networks"
        yield f"{len(blocks)} blocks of {of} and {len(decoding)} of the decoder ({BACKEND})"


def networks_in(pipe: Any) -> list[nn.Module]:
    """The networks that denoise in a pipeline."""
    return [network for name in family_of(pipe).denoisers if (network := pipe.components.get(name)) is not None]


def beside(pipe: Any, guidance: Guidance | None) -> list[nn.Module]:
    """The networks that a guidance method names."""
    return [] if guidance is None else [*networks_named(pipe, guidance).values()]


@contextmanager
def _by_torch(blocks: list[nn.Module], dynamic: bool | None) -> Iterator[None]:
    before = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            block._compiled_call_impl = _apart(torch.compile(block._call_impl, backend=BACKEND, dynamic=dynamic))
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            block._compiled_call_impl = own


def _apart(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call outside of the mode that watches a sampler's step: torch would compile each block once within it, and
    again for decoding and for what is recomputed on the way back."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with unwatched():
            return call(*args, **kwargs)

    return called


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers model that it repeats: those that it names itself, and `BLOCKS`."""
    names = BLOCKS | set(getattr(type(model), "_repeated_blocks", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
