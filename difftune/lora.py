"""Low-rank adapters (https://arxiv.org/abs/2106.09685) by peft: W x + alpha / rank * B A x, with A and B trained.

Only what `pipe.load_lora_weights(folder)` reads back exactly is written: peft's own keys and the adapter's settings,
without which an alpha other than the rank is silently lost.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from difftune.checkpoint import flush
from difftune.errors import UserError
from solvers.families import family_of

WEIGHTS = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
NAME = "default"  # the adapter's, as diffusers' own scripts have it


def add(pipe: Any, rank: int = 4, alpha: int | None = None, dropout: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Freeze the pipeline, add an adapter to the attention of its denoiser, and return the weights to train, by name.

    A is Gaussian and B is zero, so that the first output is the base model's; both are float32. `alpha` is `rank` if
    None. Raises UserError if the pipeline has an adapter already.
    """
    network = network_of(pipe)
    if network._hf_peft_config_loaded:
        raise UserError(f"the {type(network).__name__} has adapters already: fuse or unload them first")
    freeze(pipe)
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(ATTENTION),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network.add_adapter(settings, NAME)
    for weight in weights(network).values():
        weight.data = weight.data.float()
    return weights(network)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def load(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `weights` gave, bit for bit. Raises UserError for tensors of another adapter."""
    own = weights(network)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise UserError("the LoRA weights are not of this model and rank: resume with the settings of the first run")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(tensors[name])


@contextmanager
def off(network: nn.Module) -> Iterator[None]:
    """The network as it was before its adapters, bit for bit; they are back at the end, also after an exception.

    No weight's `requires_grad` changes, unlike under `network.disable_adapters()`: a graph that was built before is
    differentiated as if nothing had happened.
    """
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def save(pipe: Any, folder: str | Path) -> Path:
    """Write the adapter as `folder/pytorch_lora_weights.safetensors`, whole or not at all."""
    network, kind = network_of(pipe), family_of(pipe).denoisers[0]
    layers = {f"{kind}_lora_layers": {k: v.contiguous() for k, v in get_peft_model_state_dict(network).items()}}
    adapter = {k: sorted(v) if isinstance(v, set) else v for k, v in network.peft_config[NAME].to_dict().items()}
    settings = {f"{kind}_lora_adapter_metadata": adapter}  # a set's order would differ from process to process
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as temporary:  # a folder: loaders look at every file
        type(pipe).save_lora_weights(temporary, **layers, **settings, weight_name=WEIGHTS)
        sort_header(Path(temporary, WEIGHTS))
        flush(Path(temporary, WEIGHTS))
        os.replace(Path(temporary, WEIGHTS), folder / WEIGHTS)
    return folder / WEIGHTS


def sort_header(file: Path) -> None:
    """Put a safetensors file's header in order: its metadata comes in a random one, and equal weights shall be equal
    files."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format's own padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def network_of(pipe: Any) -> Any:
    return pipe.components[family_of(pipe).denoisers[0]]


def freeze(pipe: Any) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
