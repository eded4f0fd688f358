"""Low-rank adapters (https://arxiv.org/abs/2106.09685) by peft: W x + alpha / rank * B A x, with A and B trained.

Only what `pipe.load_lora_weights(folder)` reads back exactly is written: peft's own keys and the adapter's settings,
without which an alpha other than the rank is silently lost.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin, SD3LoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor, nn

from difftune.errors import UserError
from difftune.files.output import whole_file, write
from difftune.pipelines import fingerprint, lora_formats
from difftune.pipelines.lora_formats import FAMILY, WEIGHTS, Adapter
from solvers.families.table import family_of

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # attention to the text's tokens, of SD3 and FLUX
GATED = tuple(f"feed_forward.{layer}{i}" for layer in ("w", "linear_") for i in (1, 2, 3))  # of Z-Image and Lumina2
MIXING = ("linear_in", "linear_out", "conv_inverted", "conv_point")  # of FLUX.2, and of Sana
FEED_FORWARD = ("net.0.proj", "net.2", "proj_mlp", *GATED, *MIXING)
CONVOLUTIONS = ("conv1", "conv2", "conv", "conv_shortcut", "proj_in", "proj_out", "time_emb_proj")
LAYOUTS = {
    "attention": ATTENTION + JOINT,
    "attention+ff+conv": ATTENTION + JOINT + FEED_FORWARD + CONVOLUTIONS,
}
SINGLE = "single_transformer_blocks."  # of FLUX.2; those of FLUX.1 have layers of the names above
MAGNITUDES = "lora_magnitude_vector"  # of DoRA
NAME = "default"  # of the adapter that is trained, as diffusers' own scripts have it


def add(
    pipe: Any,
    rank: int = 4,
    alpha: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    layout: str = "attention",
) -> dict[str, Tensor]:
    """Freeze the pipeline, add an adapter to its denoiser's layers of a layout, and return the weights to train, by
    name.

    A is Gaussian and B is zero, so that the first output is the base model's; both are float32. `alpha` is `rank` if
    None, layout one of `LAYOUTS`. Raises UserError if the pipeline has an adapter already.
    """
    network = network_of(pipe)
    if adapted(network):
        raise UserError(f"the {type(network).__name__} has adapters already: fuse or unload them first")
    freeze(pipe)
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=[*LAYOUTS[layout], *single_projections(network)],
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        _inject(network, settings, NAME)
    for weight in weights(network).values():
        weight.data = weight.data.float()
    return weights(network)


def single_projections(network: nn.Module) -> list[str]:
    """The attention layers of FLUX.2's blocks of one stream: into queries, keys, values and the feed-forward part at
    once, and out of it."""
    names = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    return [name for name in names if name.startswith(SINGLE) and name.endswith((".to_qkv_mlp_proj", ".to_out"))]


def adapted(network: nn.Module) -> bool:
    """Whether the network has an adapter."""
    return any(isinstance(module, BaseTunerLayer) for module in network.modules())


def _inject(network: nn.Module, settings: LoraConfig, name: str) -> None:
    """Put an adapter into a network, also into one that diffusers gives no method for it (PixArt's)."""
    if isinstance(network, PeftAdapterMixin):
        network.add_adapter(settings, name)
    else:
        inject_adapter_in_model(settings, network, name)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def load(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `weights` gave, bit for bit. Raises UserError for tensors of another adapter."""
    own = weights(network)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise UserError("the weights are not of this model, layout and rank: resume with the settings of the first run")
    _put(own, tensors)


def start_from(network: nn.Module, folder: str | Path) -> None:
    """Give the trained adapter the weights that a training run wrote to the folder. UserError if they do not fit."""
    _, tensors = read_adapter(folder)
    own = weights(network)
    found = {name: tensors.get(name.replace(f".{NAME}.", ".")) for name in own}
    if len(tensors) != len(own) or any(t is None or t.shape != own[name].shape for name, t in found.items()):
        raise UserError(f"the LoRA of {folder} does not fit this {type(network).__name__}: leave --lora out")
    _put(own, {name: tensor for name, tensor in found.items() if tensor is not None})


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors of an adapter that `save` wrote, by their layers' names in the network."""
    file = Path(folder, WEIGHTS)
    check_head(file)
    with safe_open(file, "pt") as found:
        about = (found.metadata() or {}).get("lora_adapter_metadata")
    if about is None:
        raise UserError(f"{file} has no settings of an adapter: give the folder of a training run")
    settings = {key.partition(".")[2]: value for key, value in json.loads(about).items()}
    return settings, {key.partition(".")[2]: tensor for key, tensor in load_file(file).items()}


@contextmanager
def lent(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with other weights, those that are named; its own are back at the end, bit for bit."""
    own = {name: weight for name, weight in network.named_parameters() if name in tensors}
    before = {name: weight.detach().clone() for name, weight in own.items()}
    try:
        _put(own, tensors)
        yield
    finally:
        _put(own, before)


@torch.no_grad()
def _put(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
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


def save(
    pipe: Any, folder: str | Path, tensors: Mapping[str, Tensor] | None = None, adapter_name: str | None = None
) -> Path:
    """Write an adapter as `folder/pytorch_lora_weights.safetensors`, whole or not at all.

    tensors: its weights by the names of `weights`, if they are others than the network has. adapter_name: as for
    `chosen`.
    """
    network, kind = network_of(pipe), family_of(pipe).denoisers[0]
    name = chosen(network, adapter_name)
    layers = {f"{kind}_lora_layers": adapter_of(network, name, tensors)}
    adapter = {k: sorted(v) if isinstance(v, set) else v for k, v in network.peft_config[name].to_dict().items()}
    settings = {f"{kind}_lora_adapter_metadata": adapter}  # a set's order would differ from process to process
    with whole_file(Path(folder, WEIGHTS)) as partial:
        writer = type(pipe) if isinstance(pipe, LoraBaseMixin) else SD3LoraLoaderMixin
        writer.save_lora_weights(partial.parent, **layers, **settings, weight_name=WEIGHTS)
        sort_header(partial, {fingerprint.KEY: fingerprint.digest_of(pipe), FAMILY: family_of(pipe).name})
    return Path(folder, WEIGHTS)


def chosen(network: Any, name: str | None = None) -> str:
    """The name of an adapter of the network: as given, or the only one, or the only one that is active.

    Raises UserError, with their names, if there is none of that name or the choice is open.
    """
    names = list(vars(network).get("peft_config", {}))
    if name is not None and name not in names:
        raise UserError(f"no adapter {name!r} in the {type(network).__name__}: it has {', '.join(names) or 'none'}")
    if name is not None or len(names) == 1:
        return name or names[0]
    layers = (module for module in network.modules() if isinstance(module, BaseTunerLayer))
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if len(active) != 1:
        had = ", ".join(names) or "none"
        raise UserError(f"the {type(network).__name__} has the adapters {had}: give one of them as adapter_name")
    return active[0]


def adapter_of(network: nn.Module, name: str, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An adapter's weights by peft's own keys: LAYER.lora_A.weight and LAYER.lora_B.weight.

    Not by peft's function, which leaves out LAYER where a part of its name is that of another adapter ("0").
    """
    found = {}
    for layer, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            for key, value in module.state_dict().items():
                side, _, rest = key.partition(".")
                given = value if tensors is None else tensors.get(f"{layer}.{key}")
                if side.startswith("lora_") and f"{rest}.".startswith(f"{name}.") and given is not None:
                    end = "" if side == MAGNITUDES else rest.removeprefix(name)
                    found[f"{layer}.{side}{end}"] = given.detach().cpu().contiguous()
    return found


def export_kohya(pipe: Any, file: str | Path, adapter_name: str | None = None) -> Path:
    """Write an adapter as Automatic1111, ComfyUI and kohya's scripts read it; `pipe.load_lora_weights` does too.

    The layout is `lora_formats.kohya`'s, which raises UserError for a transformer that it does not know and for DoRA.
    adapter_name: as for `chosen`.
    """
    network, family = network_of(pipe), family_of(pipe)
    name = chosen(network, adapter_name)
    settings = network.peft_config[name].to_dict()
    adapter = Adapter(family.denoisers[0], family.name, adapter_of(network, name), settings)
    write(Path(file), safetensors(lora_formats.kohya(adapter), {"format": "pt"}))
    return Path(file)


def mix(pipe: Any, shares: Mapping[str, float]) -> None:
    """Load the adapters that training wrote to the folders, each with its share: W x + sum_i share_i delta_i(x).

    Those that the pipeline has already are switched off. Two rewards are traded off after their training by shares a
    and 1 - a (https://arxiv.org/abs/2310.03739).
    """
    if not isinstance(network_of(pipe), PeftAdapterMixin):
        raise UserError(f"diffusers cannot mix adapters of a {type(network_of(pipe)).__name__}: give one alone")
    names = [attach(pipe, folder) for folder in shares]
    network_of(pipe).set_adapters(names, list(shares.values()))


def attach(pipe: Any, folder: str | Path, name: str | None = None) -> str:
    """Load an adapter that `save` wrote, and return its name, one that is free unless given: `pipe.load_lora_weights`,
    also for a pipeline that has none (PixArt's). Raises UserError if the pipeline uses not all of its tensors."""
    name = name or free_name(network_of(pipe))
    if "." in name:
        raise UserError(f"an adapter is named {name!r}: torch allows no dot in a name")
    wanted = check_head(Path(folder, WEIGHTS))
    _attach(pipe, folder, name)
    if (used := _used(pipe, name)) < wanted:
        raise UserError(
            f"the LoRA of {folder} does not fit this {type(network_of(pipe)).__name__}: {used} of its {wanted} tensors "
            "were used; give one that was trained on a model of this architecture"
        )
    return name


def check_head(file: Path) -> int:
    """The number of tensors of an adapter's file, its alphas not counted. Raises UserError if it cannot be read."""
    try:
        with safe_open(file, "pt") as found:
            names = [name for name in found.keys() if not name.endswith(".alpha")]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a safetensors file: {' '.join(str(error).split())}") from error
    if not names:
        raise UserError(f"{file} holds no tensor: give the folder of a training run that has ended")
    return len(names)


def _used(pipe: Any, name: str) -> int:
    """The tensors of an adapter in all parts of the pipeline."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    with_it = [part for part in parts if name in vars(part).get("peft_config", {})]
    return sum(len(adapter_of(part, name)) for part in with_it)


def free_name(network: Any) -> str:
    """ "default", or "default_1" and so on if there are such adapters."""
    taken = vars(network).get("peft_config", {})
    return next(name for name in (NAME, *(f"{NAME}_{i + 1}" for i in range(len(taken)))) if name not in taken)


def _attach(pipe: Any, folder: str | Path, name: str) -> None:
    if isinstance(pipe, LoraBaseMixin):
        pipe.load_lora_weights(folder, adapter_name=name)
        return
    network, prefix = network_of(pipe), f"{family_of(pipe).denoisers[0]}."
    with safe_open(Path(folder, WEIGHTS), "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = {key.removeprefix(prefix): value for key, value in load_file(Path(folder, WEIGHTS)).items()}
    _inject(network, LoraConfig(**{key.removeprefix(prefix): value for key, value in settings.items()}), name)
    set_peft_model_state_dict(network, tensors, name)


def sort_header(file: Path, notes: Mapping[str, str | None]) -> None:
    """Put a safetensors file's header in order: its metadata comes in a random one, and equal weights shall be equal
    files. notes: what is added there, of the base model."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:end])
    known = {name: note for name, note in notes.items() if note is not None}
    fields["__metadata__"] = {**fields.get("__metadata__", {}), **known}
    header = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format's own padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def network_of(pipe: Any) -> Any:
    return pipe.components[family_of(pipe).denoisers[0]]


def freeze(pipe: Any) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
