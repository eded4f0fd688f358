"""The attention of a network: torch's scaled_dot_product_attention (SDPA), or xformers where that is no slower.

xformers is never needed. It is measured on the GPU at hand, forwards and backwards, and set on one network alone:
diffusers' `set_attention_backend` would switch every model of the process, those included that it cannot serve.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from solvers.errors import UserError

FLAG = "--enable_xformers_memory_efficient_attention"
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}  # of a gradient, relative


class AttentionShape(NamedTuple):
    """The sizes of one attention layer, whose tensors are (batch, tokens, heads, width)."""

    queries: int
    keys: int
    heads: int
    width: int


SHAPES = (  # Stable Diffusion 1.5 at 512 pixels: self- and cross-attention of its three widths
    AttentionShape(4096, 4096, 8, 40),
    AttentionShape(4096, 77, 8, 40),
    AttentionShape(1024, 1024, 8, 80),
    AttentionShape(256, 256, 8, 160),
)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"sdpa": sdpa, "xformers": xformers}


def obstacle() -> str | None:
    """Why xformers cannot run here, in one sentence with the remedy; None if nothing is in its way."""
    if util.find_spec("xformers") is None:
        return f"xformers is not installed: pip install 'difftune[xformers]', or leave out {FLAG}: SDPA needs nothing"
    if not torch.cuda.is_available():
        return f"xformers needs a CUDA GPU and there is none here: leave out {FLAG}: SDPA runs anywhere"
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # a wheel that does not match torch raises anything
        return f"xformers is installed and cannot be imported ({_first_line(error)}): leave out {FLAG}, or reinstall it"
    return None


class Verdict(NamedTuple):
    """The attention to run and why."""

    backend: str
    why: str


def choose(
    device: torch.device | str, dtype: torch.dtype, shapes: Sequence[AttentionShape] = SHAPES, batch: int = 2
) -> Verdict:
    """xformers, if its forward and backward run on these shapes, give SDPA's gradients, and are no slower in total."""
    total = dict.fromkeys(ATTENTION, 0.0)
    for shape in shapes:
        inputs = _inputs(shape, batch, device, dtype)
        try:
            error = _difference(inputs)
            for name in ATTENTION:
                total[name] += _seconds(name, inputs)
        except Exception as failure:  # xformers raises NotImplementedError, CUDA RuntimeError, an import anything
            return Verdict("sdpa", f"xformers fails on {shape} in {dtype}: {_first_line(failure)}")
        if not error <= TOLERANCE[dtype]:
            return Verdict("sdpa", f"xformers' gradient is {error:.1e} from SDPA's on {shape} in {dtype}")
    times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in total.items())
    backend = "xformers" if total["xformers"] <= total["sdpa"] else "sdpa"
    return Verdict(backend, f"forward and backward in {dtype}: {times}")


def _inputs(shape: AttentionShape, batch: int, device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(batch, tokens, shape.heads, shape.width) for tokens in (shape.queries, shape.keys, shape.keys)]
    draw = lambda size: torch.randn(size, generator=generator, device=device, dtype=dtype)  # noqa: E731
    return [draw(size).requires_grad_() for size in sizes]


def _gradients(name: str, inputs: Sequence[Tensor]) -> Tensor:
    q, k, v = inputs
    out = ATTENTION[name](q, k, v)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), inputs)])


def _difference(inputs: Sequence[Tensor]) -> float:
    ours, theirs = (_gradients(name, inputs).float() for name in ("sdpa", "xformers"))
    return ((theirs - ours).norm() / ours.norm()).item()


def _seconds(name: str, inputs: Sequence[Tensor], repeats: int = 5) -> float:
    """The median, after one run that is not counted."""
    return median([_timed(name, inputs) for _ in range(repeats + 1)][1:])


def _timed(name: str, inputs: Sequence[Tensor]) -> float:
    started = time.perf_counter()
    _gradients(name, inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize(inputs[0].device)
    return time.perf_counter() - started


@contextmanager
def attention(network: Any, backend: str = "sdpa") -> Iterator[None]:
    """Within, this diffusers network attends by `backend`; afterwards as before. No other model changes.

    The backward pass of a checkpointed run must be within too. "sdpa" is diffusers' own default, and changes nothing.
    Raises ValueError for another name, and where xformers cannot run.
    """
    if backend not in ATTENTION:
        raise UserError(f"no attention {backend!r}; known: {', '.join(ATTENTION)}")
    if backend == "sdpa":
        yield
        return
    if reason := obstacle():
        raise UserError(reason)
    layers = [m for m in network.modules() if isinstance(m, Attention | AttentionModuleMixin)]
    before = [(layer, layer.processor, vars(layer.processor).get("_attention_backend")) for layer in layers]
    try:
        with _global_backend_kept():
            network.enable_xformers_memory_efficient_attention()
        yield
    finally:
        for layer, processor, own in before:
            layer.set_processor(processor)
            if "_attention_backend" in vars(processor):
                processor._attention_backend = own


@contextmanager
def _global_backend_kept() -> Iterator[None]:
    active = _AttentionBackendRegistry._active_backend
    try:
        yield
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Within, torch uses deterministic kernels and raises where there are none; afterwards as before.

    cuBLAS reads its setting when it is first used: enter before anything runs on the GPU.
    """
    if not on:
        yield
        return
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
