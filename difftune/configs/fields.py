"""What a field of a Config means: its help text, and the group of `--help` that it stands in."""

import ast
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from itertools import pairwise
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from solvers.errors import UserError
from solvers.ranges import Ranged

GROUPS = {  # title: the fields and the flags of all commands that stand there
    "What it works on": """config model lora prompt prompts reward images labels caption exemplars encoder image
        baseline noise noise_lora expert held_out validation_reward start""",
    "Sampling": """num_inference_steps sampler eta guidance guidance_scale guidance_options scales num_images
        images_per_prompt prompts_per_category batch_size height width num_frames reward_frames
        embedded_guidance transition seed seeds_per_prompt num_images_per_prompt inversion_steps""",
    "What is trained": "reference lora_anneal full_finetuning lora_layers rank lora_alpha lora_dropout variables",
    "Training steps": """max_train_steps train_batch_size gradient_accumulation_steps updates_per_round
        max_skipped_steps pairs_per_round sweeps iterations patience target""",
    "Optimiser": """optimizer learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay
        adam_epsilon max_grad_norm normalize_gradient
        normalize_reward_gradients grad_clip ema_decay""",
    "Validation": "validation_steps validation_prompts num_validation_images early_stop num_win_rate_images",
    "Memory and speed": """mixed_precision gradient memory_budget offload decode_batch
        enable_vae_tiling enable_xformers_memory_efficient_attention
        compile deterministic device max_images dry_run""",
    "Files": """output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint report_to animation
        as_json verbose""",
}
GROUP_OF = {name: title for title, names in GROUPS.items() for name in names.split()}
OWN = "Settings of its own"  # where every other field stands


class Config(Ranged):
    """The settings of a command: numbers, texts and lists of them, which a file can hold and give back as they are.

    UserError for a number that is out of its range, an unknown choice, and a value of another kind than its field's. A
    scale among `guidance_options` becomes `guidance_scale`, so that the same settings are equal.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            check_kind(name, vars(self)[name], hint)
        if not vars(self)["output_dir"].strip():
            raise UserError("the output folder has no name: give --output_dir one")
        for name, value in with_one_scale(vars(self)).items():
            object.__setattr__(self, name, value)


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def check_kind(name: str, value: Any, hint: Any) -> None:
    """UserError for a value that is not of its field's kind: a text, a list of texts, a switch or plain settings."""
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if value is None and type(None) in kinds:
        return
    if str in kinds and not isinstance(value, str):
        raise UserError(f"{name} is {value!r:.60}: it must be a text")
    if bool in kinds and not isinstance(value, bool):
        raise UserError(f"{name} is {value!r:.60}: it must be True or False")
    if list[str] in kinds and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise UserError(f"{name} is {value!r:.60}: it must be a list of texts, as in [{str(value)[:20]!r}]")
    if hint == dict[str, Any]:
        for key, setting in dict(value).items():
            check_plain(f"{name}[{key!r}]", setting)


def check_plain(name: str, value: Any) -> None:
    """UserError for what is no number, text, truth value, None, or list of them: no file could give it back."""
    if isinstance(value, list | tuple):
        for item in value:
            check_plain(name, item)
    elif not isinstance(value, str | int | float | None):
        raise UserError(
            f"{name} is a {type(value).__name__}: settings that a run writes down are numbers, texts and lists of them"
        )


def with_one_scale(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the scale of `guidance_options` as `guidance_scale`. UserError where both are given."""
    options = settings.get("guidance_options") or {}
    if "scale" not in options:
        return dict(settings)
    if settings["guidance_scale"] is not None:
        raise UserError("guidance_scale and the scale of guidance_options are the same setting: give one of them")
    rest = {key: value for key, value in options.items() if key != "scale"}
    return {**settings, "guidance_scale": options["scale"], "guidance_options": rest}


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module by name, from its source, which is parsed once for all of them."""
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def documented(config: type) -> type:
    """The dataclass, where `metadata["help"]` of each field is the docstring below it, or below the one it replaces."""
    tree = _classes(config.__module__)[config.__name__]
    bases = [base for base in reversed(config.__mro__[1:-1]) if "__dataclass_fields__" in vars(base)]
    texts = {f.name: f.metadata["help"] for base in bases for f in fields(base)}
    texts |= {
        name.target.id: ast.literal_eval(text.value)
        for name, text in pairwise(tree.body)
        if isinstance(name, ast.AnnAssign) and isinstance(name.target, ast.Name) and isinstance(text, ast.Expr)
    }
    for f in fields(config):
        f.metadata = MappingProxyType({**f.metadata, "help": texts[f.name]})
    return config
