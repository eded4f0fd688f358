"""Flags that several commands share."""

import click

from difftune.cli.command import DOTTED, Values

AT_LEAST_ONE = click.IntRange(min=1)
MODEL = click.Option(
    ["--model", "--pretrained_model_name_or_path", "model"],
    metavar="NAME|FOLDER|HUB_ID",
    required=True,
    help="An embedded model (tiny, tiny-turbo, tiny-weak), a diffusers folder, or a Hub id.",
)
LORA = Values(
    ["--lora"], metavar="FOLDER[=SHARE] ...", help="Load what training wrote there; several LoRAs are mixed by shares."
)
GUIDANCE: list[click.Parameter] = [
    click.Option(
        ["--guidance"],
        metavar="NAME",
        default="cfg",
        show_default=True,
        help="One of `difftune methods`; interval:apg is APG in an interval.",
    ),
    click.Option([DOTTED + "KEY", "guidance_options"], metavar="VALUE", multiple=True, help="One of its settings."),
    click.Option(["--guidance_scale"], type=float, help="Short for --guidance.scale."),
]
REWARD = Values(
    ["--reward"], metavar="NAME[=WEIGHT] ...", required=True, help="Of `difftune methods`; weight 1 if not given."
)
REWARDS = Values(
    ["--reward"], metavar="NAME ...", help="Scores beside saturation and contrast; the oracle where it can judge."
)
METHODS = Values(
    ["--guidance"], metavar="NAME ...", default=["cfg"], show_default=True, help="Methods of `difftune methods`."
)
SCALES = Values(["--scales"], metavar="W ...", type=float, default=[5.0], show_default=True, help="CFG scales.")
PROMPT = Values(["--prompt"], metavar="TEXT ...", required=True, help="One prompt or several.")
STEPS = click.Option(
    ["--num_inference_steps", "--steps", "num_inference_steps"],
    type=AT_LEAST_ONE,
    default=25,
    show_default=True,
    help="Sampling steps.",
)
SEED = click.Option(["--seed"], type=click.IntRange(min=0), default=0, show_default=True, help="Of all random numbers.")
OUTPUT_DIR = click.Option(
    ["--output_dir"], type=click.Path(), metavar="FOLDER", required=True, help="A new or empty folder."
)
BATCH_SIZE = click.Option(
    ["--batch_size"], type=AT_LEAST_ONE, default=16, show_default=True, help="Images at a time; it changes no image."
)
JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON alone on stdout.")
