"""What difftune finds on this machine."""

import os
import platform
from typing import Any

import torch

from difftune.files.versions import LIBRARIES, version
from difftune.models import MODELS, path
from solvers.families.attention import choose, obstacle

FURTHER = ("open_clip_torch", "torchdiffeq", "xformers", "matplotlib", "tensorboard", "wandb", "trackio")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def report() -> dict[str, Any]:
    """Versions, devices, attention backends, embedded models, cache."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in (*LIBRARIES, *FURTHER)},
        "devices": [device(name) for name in devices()],
        "attention": attention(),
        "models": models(),
        "cache": cache(),
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }


def devices() -> list[str]:
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def device(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "dtypes": [dtype for dtype, kind in DTYPES.items() if runs(name, kind)]}
    if name.startswith("cuda"):
        properties = torch.cuda.get_device_properties(name)
        return found | {"hardware": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return found | {"hardware": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


def runs(name: str, dtype: torch.dtype) -> bool:
    """Whether a matrix product works."""
    try:
        x = torch.ones(8, 8, device=name, dtype=dtype)
        return bool((x @ x).isfinite().all())
    except (RuntimeError, TypeError):
        return False


def attention() -> dict[str, str]:
    """Backends of torch's attention; and xformers, forwards and backwards on this GPU, or what is in its way."""
    cuda = torch.backends.cuda
    kernels = {
        "flash": cuda.flash_sdp_enabled(),
        "memory_efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    enabled = [name for name, on in kernels.items() if on] if torch.cuda.is_available() else ["cpu"]
    return {"sdpa": ", ".join(enabled), "xformers": xformers()}


def xformers() -> str:
    """What `--enable_xformers_memory_efficient_attention` would do here."""
    if reason := obstacle():
        return reason.removeprefix("xformers is ")
    found = choose("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
    return f"{'used' if found.backend == 'xformers' else 'not used'}: {found.why}"


def models() -> dict[str, bool]:
    """The embedded models, and whether their weights are here."""
    return {name: _present(name) for name in MODELS}


def _present(name: str) -> bool:
    try:
        return path(name).exists()
    except OSError:
        return False


def cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE
