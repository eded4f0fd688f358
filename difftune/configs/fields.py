"""What a field of a Config means: its help text, and the group of `--help` that it stands in."""

import ast
import inspect
from dataclasses import fields
from itertools import pairwise
from types import MappingProxyType

from solvers.errors import UserError
from solvers.ranges import Ranged

GROUPS = {  # title: the fields and the flags of all commands that stand there
    "What it works on": """config model lora prompt prompts reward images labels caption exemplars encoder image
        baseline noise expert held_out validation_reward start""",
    "Sampling": """num_inference_steps sampler eta guidance guidance_scale guidance_options scales num_images
        images_per_prompt prompts_per_category batch_size height width embedded_guidance transition seed
        seeds_per_prompt num_images_per_prompt inversion_steps""",
    "What is trained": "full_finetuning lora_layers rank lora_alpha lora_dropout variables",
    "Training steps": """max_train_steps train_batch_size gradient_accumulation_steps updates_per_round
        max_skipped_steps pairs_per_round sweeps iterations patience target""",
    "Optimiser": """optimizer learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay
        adam_epsilon max_grad_norm grad_clip ema_decay""",
    "Validation": "validation_steps validation_prompts num_validation_images early_stop num_win_rate_images",
    "Memory and speed": """mixed_precision gradient memory_budget offload decode_batch
        enable_vae_tiling enable_xformers_memory_efficient_attention
        deterministic device max_images""",
    "Files": """output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint report_to animation
        as_json""",
}
GROUP_OF = {name: title for title, names in GROUPS.items() for name in names.split()}
OWN = "Settings of its own"  # where every other field stands


class Config(Ranged):
    """The settings of a command. UserError for a number that is out of its range, and for an unknown choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not vars(self)["output_dir"].strip():
            raise UserError("the output folder has no name: give --output_dir one")


def documented(config: type) -> type:
    """The dataclass, where `metadata["help"]` of each field is the docstring below it, or below the one it replaces."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(tree, ast.ClassDef)
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
