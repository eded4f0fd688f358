"""Settings with which every recipe trains a random pipeline in a second or two. A new recipe that needs more than
`SHARED` says so in `MORE`."""

from pathlib import Path
from typing import Any

import torch

from difftune.files.checkpoint import State
from difftune.files.prompts import prompts_named
from difftune.recipes import RECIPES, recipe_of
from difftune.rollouts.session import Session, open_session
from rewards.simple import Brightness

SHARED = {
    "max_train_steps": 4,
    "train_batch_size": 2,
    "num_inference_steps": 3,
    "learning_rate": 1e-2,
    "max_skipped_steps": 0,
    "guidance": "cfg",
    "rank": 2,
}
MORE: dict[str, dict[str, Any]] = {
    "ddpo": {
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_buffer_size": 3,
        "per_prompt_stat_tracking_min_count": 2,
    },
    "grpo": {"num_images_per_prompt": 2, "gradient_accumulation_steps": 1, "sde_window": 2},
    "nft": {"num_images_per_prompt": 2, "gradient_accumulation_steps": 1, "levels_per_image": 2},
    "drtune": {"truncation_steps": 2},
    "kto": {"train_batch_size": 4},
    "dragon": {"pairs_per_round": 4},
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # settings with a way of their own, and their recipe
    "guard": ("grpo", {"trust": "guard"}),
    "awm": ("nft", {"loss": "awm"}),
    "dgpo": ("nft", {"loss": "dgpo"}),
    "flowbp": ("alignprop", {"gradient": "flowbp[active=2]"}),
    "leapalign": ("alignprop", {"gradient": "leapalign"}),
    "direct-align": ("alignprop", {"gradient": "direct-align"}),
}


def toy(name: str, folder: Path, **more: Any) -> Any:
    """The recipe's settings, or a variant's, with prompts in a file of the folder."""
    name, own = VARIANTS.get(name, (name, {}))
    prompts = folder / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("red circle\nblue square\nred square\n")
    return RECIPES[name].config(**{**SHARED, "prompts": str(prompts), **MORE.get(name, {}), **own, **more})


class Bright(Brightness):
    """Brightness that needs the generators too: a resumed run must find them as they were."""

    def __call__(self, images, prompts):
        return super().__call__(images + 1e-3 * torch.randn_like(images), prompts)


def session_of(config: Any, pipe: Any, reward: Any = None, state: State | None = None) -> Session:
    """What `train` hands to the recipe; the kernels are torch's own, so that nothing remains to close."""
    prompts, reference = prompts_named(config.prompts, config.seed), recipe_of(config).wants_reference(config)
    with open_session(config, state, pipe, prompts, reward, reference, [].append) as session:
        return session
