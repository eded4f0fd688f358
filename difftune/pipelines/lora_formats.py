"""A LoRA in the layouts of other programs: kohya's scripts and Automatic1111, and ComfyUI."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors
from torch import Tensor

from difftune.errors import UserError
from difftune.files.output import write
from difftune.pipelines.lora_kohya import Layer, kohya_layers

WEIGHTS = "pytorch_lora_weights.safetensors"
FAMILY = "difftune_family"  # in the file's metadata
MAPPED = ("sd3", "flux", "flux2", "pixart", "qwen", "zimage")  # transformers whose map in ComfyUI is published
KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}
Tensors = Mapping[str, Tensor]


def export(folder: str | Path, file: str | Path, layout: str) -> Path:
    """Write the LoRA that training left in `folder` to a file in another layout: a name of `LAYOUTS`.

    The model is not needed. Raises UserError if the folder holds no LoRA, for one that the layout cannot hold, and
    for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"no layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if Path(file).suffix != ".safetensors":
        raise UserError(f"{file} is the file to write: give it a name that ends in .safetensors")
    adapter = read(Path(folder, WEIGHTS))
    write(Path(file), safetensors(LAYOUTS[layout](adapter), {"format": "pt"}))
    return Path(file)


class Adapter(NamedTuple):
    """A LoRA: its network's kind ("unet" or "transformer") and family, its tensors by layer and side, its settings."""

    kind: str
    family: str
    tensors: Tensors
    settings: Mapping[str, Any]


def read(file: Path) -> Adapter:
    """The LoRA of a file that training wrote."""
    try:
        with safe_open(file, "pt") as found:
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
            notes = found.metadata()
            settings = json.loads(notes["lora_adapter_metadata"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no LoRA of difftune train: give the --output_dir of a run") from error
    kind = next(iter(tensors)).partition(".")[0]
    own = {name.removeprefix(f"{kind}."): value for name, value in settings.items()}
    layers = {name.removeprefix(f"{kind}."): value for name, value in tensors.items()}
    return Adapter(kind, notes.get(FAMILY, "a family that its file does not name"), layers, own)


def kohya(adapter: Adapter) -> dict[str, Tensor]:
    """Layer a.b.c of a UNet as lora_unet_a_b_c, with lora_down, lora_up and alpha; a transformer's as `kohya_layers`.

    diffusers reads one alpha for all layers of a UNet, so a layer of another alpha than the rest has that in its
    lora_up. Raises UserError for a transformer that the layout does not know, and for DoRA.
    """
    tensors, settings = adapter.tensors, adapter.settings
    if settings.get("use_dora"):
        raise UserError(f"this layout has no magnitudes, and the adapter is of DoRA: keep {WEIGHTS}")
    if adapter.kind != "unet":
        return kohya_layers(adapter.family, layers_of(adapter))
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".")
        name = f"lora_unet_{layer.replace('.', '_')}"
        more = alpha_of(layer, tensors, settings) / settings["lora_alpha"] if side == "lora_B" else 1.0
        found[f"{name}.{KOHYA[side]}.weight"] = value if more == 1 else more * value
        found[f"{name}.alpha"] = torch.tensor(float(settings["lora_alpha"]))
    return found


def layers_of(adapter: Adapter) -> dict[str, Layer]:
    """The adapted layers by name."""
    tensors = adapter.tensors
    names = dict.fromkeys(key.removesuffix(".weight").rpartition(".")[0] for key in tensors)
    sides = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    return {name: Layer(*both, alpha_of(name, tensors, adapter.settings)) for name, both in sides.items()}


def comfyui(adapter: Adapter) -> dict[str, Tensor]:
    """A UNet as kohya's; a transformer by diffusers' own names, with the alpha of each layer, if ComfyUI's map of them
    is published. Raises UserError for another family."""
    kind, tensors = adapter.kind, adapter.tensors
    if kind == "unet":
        return kohya(adapter)
    if adapter.family not in MAPPED:
        raise UserError(
            f"the names that ComfyUI reads are known of UNets and of {', '.join(MAPPED)}, and this is a LoRA of"
            f" {adapter.family}: keep {WEIGHTS}"
        )
    layers = {key.removesuffix(".weight").rpartition(".")[0] for key in tensors}
    alphas = {f"{kind}.{layer}.alpha": torch.tensor(alpha_of(layer, tensors, adapter.settings)) for layer in layers}
    return {f"{kind}.{key}": value for key, value in tensors.items()} | dict(sorted(alphas.items()))


def alpha_of(layer: str, tensors: Tensors, settings: Mapping[str, Any]) -> float:
    """The alpha of a layer, so that its update is alpha / rank B A x."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), layer), settings["lora_alpha"]))
    rank = len(tensors[f"{layer}.lora_A.weight"])
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


LAYOUTS: dict[str, Callable[[Adapter], dict[str, Tensor]]] = {
    "kohya": kohya,
    "comfyui": comfyui,
}
