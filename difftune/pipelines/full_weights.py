"""Full fine-tuning: every weight of the denoiser is trained, in float32, and saved as diffusers saves a network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as FILE
from safetensors.torch import save_file
from torch import Tensor

from difftune.files.output import whole_folder
from difftune.pipelines import lora
from difftune.pipelines.fingerprint import KEY, digest_of
from solvers.families.table import family_of


def add(pipe: Any) -> dict[str, Tensor]:
    """Freeze the pipeline except its denoiser, make that float32, and return its weights, by name."""
    network = lora.network_of(pipe)
    lora.freeze(pipe)
    network.float().requires_grad_(True)
    return lora.weights(network)


def folder_of(pipe: Any, folder: str | Path) -> Path:
    """The folder in which `save` puts the network: `folder/unet`, or `folder/transformer`."""
    return Path(folder, family_of(pipe).denoisers[0])


def save(pipe: Any, folder: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write the network with these weights to a folder of its own, whole or not at all.

    It is read by `type(network).from_pretrained`, and by `difftune sample --lora`.
    """
    network, final = lora.network_of(pipe), folder_of(pipe, folder)
    whole = {**network.state_dict(), **tensors}  # with the buffers
    with whole_folder(final) as partial:
        network.save_config(partial)
        about = {"format": "pt"} if (digest := digest_of(pipe)) is None else {"format": "pt", KEY: digest}
        save_file({k: v.detach().cpu().contiguous() for k, v in whole.items()}, partial / FILE, about)
    return final


def load(pipe: Any, folder: str | Path) -> None:
    """Replace the weights of the pipeline's denoiser by those in `folder`."""
    network = lora.network_of(pipe)
    found = type(network).from_pretrained(folder_of(pipe, folder), torch_dtype=network.dtype)
    network.load_state_dict(found.state_dict())
