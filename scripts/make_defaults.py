"""Writes the table of settings on every recipe's page: the defaults, one GPU, and the embedded model.

    python scripts/make_defaults.py

A table stands between the two comments START and END. Its first column is read from the recipe's Config, its last from
difftune/examples/tiny-RECIPE.yaml, so that neither can differ from what a run takes; a test holds the pages to it.
"""

import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
from benching import table  # noqa: E402

from difftune.configs.training import TrainingConfig  # noqa: E402
from difftune.files.output import write  # noqa: E402
from difftune.recipes import RECIPES, Recipe  # noqa: E402
from guidance.methods.catalogue import GUIDANCE  # noqa: E402

START, END = "<!-- settings: python scripts/make_defaults.py -->", "<!-- end of settings -->"
SHARED = ("num_inference_steps", "guidance", "train_batch_size", "gradient_accumulation_steps", "num_images_per_prompt")
SHARED += ("learning_rate", "adam_weight_decay", "max_grad_norm", "rank", "mixed_precision")
NOT_SHOWN = {"output_dir", "seed", "model", "reward", "sampler", "labels", "images", "caption", "exemplars", "encoder"}
NOT_SHOWN |= {"lora_layers", "memory_budget", "offload", "loss_coeff"}

BF16 = {"mixed_precision": "bf16"}
GRADIENT = {**BF16, "train_batch_size": 4, "gradient_accumulation_steps": 8}
POLICY = {**BF16, "gradient_accumulation_steps": 8}
PAIRS = {**BF16, "gradient_accumulation_steps": 32}
ONE_GPU: dict[str, dict[str, Any]] = {  # what a stranger changes on Stable Diffusion 1.5 (a few-step model: SD-Turbo)
    **dict.fromkeys(("alignprop", "draft", "drtune", "refl", "adjoint-matching"), GRADIENT),
    "hypernoise": {**BF16, "model": "stabilityai/sd-turbo", "train_batch_size": 4, "gradient_accumulation_steps": 4},
    **dict.fromkeys(("grpo", "nft"), POLICY),
    "ddpo": {**POLICY, "num_images_per_prompt": 8},
    "d3po": {**BF16, "gradient_accumulation_steps": 4},
    **dict.fromkeys(("dpo", "kto", "dro"), PAIRS),
    "pso": {**BF16, "model": "stabilityai/sd-turbo", "gradient_accumulation_steps": 8},
    "dragon": {**BF16, "train_batch_size": 4, "gradient_accumulation_steps": 2},
}
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def settings_of(recipe: Recipe) -> list[str]:
    """The names of the table's rows: what all recipes share and decide about, and what is the recipe's own."""
    names = [f.name for f in fields(recipe.config)]
    shared = {f.name for f in fields(TrainingConfig)}
    own = [name for name in names if name not in shared | NOT_SHOWN | set(SHARED)]
    return [*(name for name in SHARED if name in names), *own]


def default_of(recipe: Recipe, name: str) -> Any:
    (field,) = [f for f in fields(recipe.config) if f.name == name]
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]


def example_of(recipe: Recipe) -> dict[str, Any]:
    """The settings of the recipe's example on an embedded model."""
    return yaml.safe_load((ROOT / "difftune/examples" / f"tiny-{recipe.name}.yaml").read_text())


def unset(recipe: Recipe, name: str) -> str:
    """What a setting is where it is not given, by the end of its help. ValueError if the help does not say."""
    (text,) = [" ".join(f.metadata["help"].split()) for f in fields(recipe.config) if f.name == name]
    _, found, what = text.partition("If not given: ")
    if not found:
        raise ValueError(f"{recipe.name}: the help of {name} does not say what holds if it is not given: {text}")
    return what.rstrip(".")


def cell(recipe: Recipe, name: str, value: Any) -> str:
    return unset(recipe, name) if value is None else said(name, value)


def said(name: str, value: Any) -> str:
    if name == "guidance":
        scale = vars(GUIDANCE[value]()).get("scale")
        return value if scale is None or value == "none" else f"{value}, scale {scale:g}"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def settings_table(recipe: Recipe) -> str:
    """The settings of a recipe; an empty cell is as the default."""
    example, changed = example_of(recipe), ONE_GPU[recipe.name]
    rows = []
    for name in settings_of(recipe):
        default = cell(recipe, name, default_of(recipe, name))
        others = [cell(recipe, name, source.get(name, default_of(recipe, name))) for source in (changed, example)]
        rows.append([f"`{name}`", default, *("" if other == default else other for other in others)])
    head = ["setting", "default", one_gpu_title(recipe), f"`--config tiny-{recipe.name}`"]
    return table(head, rows)


def one_gpu_title(recipe: Recipe) -> str:
    turbo = "model" in ONE_GPU[recipe.name]
    return "SD-Turbo, one GPU" if turbo else "SD 1.5, one GPU"


def flags(recipe: Recipe) -> str:
    """The command of the table's third column."""
    changed = {"model": BASE, **ONE_GPU[recipe.name]}
    return " ".join([f"difftune train {recipe.name}", *(f"--{name} {value}" for name, value in changed.items())])


def block(recipe: Recipe) -> str:
    """What stands between the comments."""
    lead = (
        f"On one GPU, take the defaults with the changes of the third column: `{flags(recipe)} --reward REWARD "
        "--prompts FILE`. Its batches are smaller than the papers', which used many GPUs. Only the last column was run "
        "to its end here; on a GPU we measured the [memory of AlignProp at batch 4](../training.md#measured). An empty "
        "cell is the default."
    )
    return f"{START}\n{lead}\n\n{settings_table(recipe)}\n{END}"


def renewed(text: str, recipe: Recipe) -> str:
    """The page with its table of today. ValueError for a page without the two comments."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"docs/recipes/{recipe.name}.md lacks {START} or {END}")
    return f"{before}{block(recipe)}{after}"


def main() -> None:
    for recipe in RECIPES.values():
        page = ROOT / "docs/recipes" / f"{recipe.name}.md"
        write(page, renewed(page.read_text(), recipe))


if __name__ == "__main__":
    main()
