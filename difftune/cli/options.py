"""Flags that several commands share."""

from typing import Any

import click

from difftune.cli.command import DOTTED, Flag, Number, Values
from solvers.ranges import Count, Many, NotNegative, Range, Seed, Steps, range_of


def number(hint: Any) -> Number:
    """What reads a number of that annotation."""
    within = range_of(hint)
    assert within is not None
    return Number(within)


AT_LEAST_ONE = number(Count)
NOT_NEGATIVE = number(NotNegative)
PORT = Number(Range(0, 65535, whole=True))
MODEL = Flag(
    ["--model", "--pretrained_model_name_or_path", "model"],
    metavar="NAME|FOLDER|HUB_ID",
    required=True,
    help="Model to draw with: tiny, tiny-turbo, a folder in diffusers' format, or an id on the Hub.",
)
LORA = Values(
    ["--lora"],
    metavar="FOLDER[=SHARE] ...",
    help="Folder of a training run, whose LoRA is loaded; several are mixed by their shares.",
)
GUIDANCE: list[click.Parameter] = [
    Flag(
        ["--guidance"],
        metavar="NAME",
        default="cfg",
        help="Guidance method: one of `difftune methods`; interval:apg is APG in an interval.",
    ),
    Flag(
        [DOTTED + "KEY", "guidance_options"],
        metavar="VALUE",
        multiple=True,
        help="A setting of the guidance method, as in --guidance.eta 0.5.",
    ),
    Flag(
        ["--guidance_scale"],
        type=number(float),
        help="Short for --guidance.scale. If not given: the method's own default.",
    ),
]
REWARD = Values(
    ["--reward"],
    metavar="NAME[=WEIGHT] ...",
    required=True,
    help="Rewards of `difftune rewards list`; a weight is 1 if not given.",
)
REWARDS = Values(
    ["--reward"],
    metavar="NAME ...",
    help="Rewards beside saturation and contrast. If not given: the oracle, if it can judge all prompts.",
)
METHODS = Values(
    ["--guidance"], metavar="NAME ...", default=["cfg"], help="Guidance methods to compare: of `difftune methods`."
)
SCALES = Values(["--scales"], metavar="W ...", type=number(float), default=[7.5], help="CFG's scales to compare at.")
PROMPT = Values(["--prompt"], metavar="TEXT ...", required=True, help="Prompts of the pictures.")
STEPS = Flag(
    ["--num_inference_steps", "--steps", "num_inference_steps"],
    type=number(Steps),
    default=25,
    help="Sampler steps of an image.",
)
SEED = Flag(["--seed"], type=number(Seed), default=0, help="Seed of all random numbers.")
OUTPUT_DIR = Flag(["--output_dir"], metavar="FOLDER", required=True, help="Folder of the results: new, or empty.")
BATCH_SIZE = Flag(["--batch_size"], type=AT_LEAST_ONE, default=16, help="Images at a time; it changes no image.")
DRY_RUN = Flag(
    ["--dry_run"],
    is_flag=True,
    show_default=False,
    help="Only say what would be loaded, downloaded and drawn, and measure time and memory on a small part of it.",
)
JSON = Flag(["--json", "as_json"], is_flag=True, show_default=False, help="Print JSON alone on stdout.")


def count(name: str, default: int | None, doc: str) -> Flag:
    """A flag for a whole number of things, at least 1."""
    return Flag([f"--{name}"], type=number(Many), default=default, help=doc)
