"""What is written is read back: Config -> file -> Config is the identity, and the file makes the same bits."""

import random
from dataclasses import fields
from math import inf, isfinite
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from difftune.cli.command import Number
from difftune.cli.guidance import guidance_of
from difftune.cli.program import cli
from difftune.cli.train import configured
from difftune.configs.noise import RenoConfig
from difftune.configs.search import SearchConfig
from difftune.configs.written import OF_A_FOLDER, Dumper, settings_yaml
from difftune.errors import UserError
from difftune.lookup import guidance_kinds
from difftune.recipes import RECIPES
from guidance.methods.catalogue import GUIDANCE
from solvers.ranges import Range, choices_of, range_of
from tests.difftune.cli.test_help import ALL

CONFIGS = {("train", name): recipe.config for name, recipe in RECIPES.items()}
CONFIGS |= {("optimize",): RenoConfig, ("search",): SearchConfig}
COMMANDS = dict(ALL)
WRITTEN = [words for words, command in ALL if any(p.name == "config" for p in command.params)]

TEXTS = [  # what YAML, a shell or a careless reader takes for something else
    "7", "7.5", "1e3", "010", "0x1F", "1_000", "12:30:00", "2020-01-01", "true", "No", "on", "null", "~", "none",
    "None", ".inf", "-.INF", ".nan", "nan", "=", "<<", "a: b", "a:", "a #b", "#a", "'", '"', "\"'", "it's", "- a", "-a",
    "--seed", "*a", "&a", "!a", "!!int 3", "%a", "@a", "`a", "[a]", "{a: 1}", "a, b", "? a", "| a", "> a", "a;b", ";",
    "a=b", "$HOME", "%s", "{}", "\\", "a\\nb", "---", "...", "a\nb", "a\n", "\na", " a", "a ", "a  b", "a\tb", "a\rb",
    "a\r\nb", "\x07a", "é", "日本", "👍🏽", "a\u2028b", "a\x85b", "a\u200db", "\ufeffa", "e\u0301", "\u202eabc",
    "word " * 60, "x" * 300,
]  # fmt: skip
REWARDS = [
    "brightness", "jpeg=0.5", "jpeg[quality=40]=-1e-05", "tiny-clip", "contrast=3", "saturation=0.1",
    "http://127.0.0.1:1/a=2", "smooth[reward=jpeg[quality=40], shifts=4]=0.5",
]  # fmt: skip


class Draw:
    """Values of a field, drawn by a seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def one(self, values: Any) -> Any:
        return self.random.choice(list(values))

    def text(self) -> str:
        return self.one(TEXTS)

    def number(self, within: Range) -> float:
        low = within.low if isfinite(within.low) else -1e9
        high = within.high if isfinite(within.high) else 1e9
        drawn = [low, high, low + 1, low + (high - low) * self.random.random(), low + 1e-05, low + 1.0 / 3]
        drawn += [inf, -inf] if within.infinite else []
        kind = int if within.whole else float
        return self.one(x for x in (d if d in (inf, -inf) else kind(d) for d in drawn) if x in within)

    def value(self, hint: Any, none: float = 0.2) -> Any:
        """A value that fits an annotation; None in a minority of the cases where it may be."""
        kinds = kinds_of(hint)
        if type(None) in kinds and self.random.random() < none:
            return None
        if names := choices_of(hint):
            return self.one(names)
        if tuples := [kind for kind in kinds if get_origin(kind) is tuple]:
            return tuple(self.value(get_args(tuples[0])[0]) for _ in range(self.one((0, 1, 2, 3))))
        if any(get_origin(kind) is list for kind in kinds):
            return [self.text() for _ in range(self.one((1, 2, 3)))]
        if within := range_of(hint):
            return self.number(within)
        return self.one((True, False)) if bool in kinds else self.text()

    def guidance(self) -> tuple[str, dict[str, Any]]:
        """A method, one that holds another too, with some of its settings."""
        name = self.one([*GUIDANCE, *(f"{outer}:{inner}" for outer in ("interval", "rescale") for inner in GUIDANCE)])
        options = {}
        for depth, kind in enumerate(guidance_kinds(name)):
            hints = get_type_hints(kind, include_extras=True)
            for f in (f for f in fields(kind) if settable(hints[f.name]) and self.random.random() < 0.7):
                options["method." * depth + f.name] = self.value(hints[f.name])
        return name, options

    def config(self, kind: type) -> Any:
        hints = get_type_hints(kind, include_extras=True)
        drawn = {f.name: self.value(hints[f.name]) for f in fields(kind) if self.random.random() < 0.6}
        name, options = self.guidance()
        scale = options.pop("scale", None)
        drawn |= {"guidance": name, "guidance_scale": scale, "guidance_options": options}
        drawn |= {"reward": self.random.sample(REWARDS, self.one((1, 2, 3))), "output_dir": f"x{self.text()}"}
        if "prompt" in hints:
            drawn["prompt"] = [f"x{self.text()}", self.text(), "a red circle"]
        return kind(**{name: value for name, value in drawn.items() if name not in OF_A_FOLDER})


def kinds_of(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated:
        return kinds_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for member in get_args(hint) for kind in kinds_of(member)]
    return [hint]


def settable(hint: Any) -> bool:
    """Whether a field can be set by a flag: it is no object alone."""
    plain = {bool, int, float, str}
    kinds = kinds_of(hint)
    return any(k in plain or get_origin(k) in (Literal, tuple) for k in kinds)


def read(words: tuple[str, ...], text: str, path: Any) -> click.Context:
    path.write_text(text, "utf-8")
    return COMMANDS[words].make_context(words[-1], ["--config", str(path)])


def same(config: Any, words: tuple[str, ...], path: Any) -> None:
    text = settings_yaml(config)
    found = configured(read(words, text, path), type(config))
    assert repr(found) == repr(config), text  # of 1 and 1.0, and of a list and a tuple, too


@pytest.mark.parametrize("words", CONFIGS, ids=" ".join)
def test_every_config_is_read_back_from_its_file(words, tmp_path):
    draw = Draw(len(str(words)))
    for _ in range(6):
        same(draw.config(CONFIGS[words]), words, tmp_path / "a.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("words", CONFIGS, ids=" ".join)
def test_many_configs_are_read_back_from_their_files(words, tmp_path):
    draw = Draw(1 + len(str(words)))
    for _ in range(150):
        same(draw.config(CONFIGS[words]), words, tmp_path / "a.yaml")


def test_every_text_is_read_back(tmp_path):
    prompts = [f"x{text}" for text in TEXTS] + [text for text in TEXTS if text.strip()]
    same(RenoConfig(prompt=prompts, reward=REWARDS, guidance="nag"), ("optimize",), tmp_path / "a.yaml")
    same(SearchConfig(prompt=["x"], setting=TEXTS, expert=TEXTS), ("search",), tmp_path / "a.yaml")
    for text in TEXTS:
        config = RenoConfig(prompt=["x"], model=text, guidance="nag", guidance_options={"negative": text})
        assert yaml.safe_load(settings_yaml(config))["model"] == text


@pytest.mark.parametrize("kind", CONFIGS.values(), ids=lambda kind: kind.__name__)
def test_what_no_file_could_give_back_is_refused(kind):
    wrong = [
        ({"reward": "tiny-clip"}, "reward is 'tiny-clip': it must be a list of texts, as in ['tiny-clip']"),
        ({"reward": {"jpeg": 2}}, "reward is {'jpeg': 2}: it must be a list of texts"),
        ({"model": 3}, "model is 3: it must be a text"),
        ({"enable_vae_tiling": "no"}, "enable_vae_tiling is 'no': it must be True or False"),
        ({"seed": True}, "seed is 'True': it must be a number"),
        ({"guidance_options": {"negative": {"a": 1}}}, "guidance_options['negative'] is a dict"),
        ({"guidance_options": {"scale": 2.0}, "guidance_scale": 3.0}, "the same setting: give one of them"),
    ]
    for settings, sentence in wrong:
        with pytest.raises(UserError) as error:
            kind(**settings)
        assert sentence in str(error.value)
    assert kind(guidance_options={"scale": 2.0, "low": 1}) == kind(guidance_scale=2.0, guidance_options={"low": 1})


def flags_of(command: click.Command, draw: Draw) -> dict[str, Any]:
    """A value for each flag, by the names that a file has for them."""
    found = {}
    for param in command.params:
        name = param.opts[0].lstrip("-")
        if isinstance(param, click.Option) and param.expose_value and name != "guidance.KEY":
            one = draw.number(param.type.within) if isinstance(param.type, Number) else f"x{draw.text()}"
            one = draw.one(param.type.choices) if isinstance(param.type, click.Choice) else one
            found[name] = draw.one((True, False)) if param.is_flag else [one, one] if param.multiple else one
    return found


def given(command: click.Command, values: dict[str, Any]) -> list[str]:
    """The values as words of the command line."""
    words = []
    for param in command.params:
        value = values.get(param.opts[0].lstrip("-"), ())
        if isinstance(value, bool):
            words += param.opts[:1] if value else param.secondary_opts
        else:
            words += [f"{param.opts[0]}={one}" for one in (value if isinstance(value, list | tuple) else [value])]
    return words


@pytest.mark.parametrize("words", WRITTEN, ids=" ".join)
def test_a_file_says_what_the_flags_say(words, tmp_path):
    """For every command, each value, in the file and on the command line, is the same."""
    command, draw = COMMANDS[words], Draw(7)
    files = ["a.png"] * any(p.nargs == -1 for p in command.params) + ["fk"] * (words == ("search",))
    for _ in range(2):
        values = flags_of(command, draw)
        (tmp_path / "a.yaml").write_text(yaml.dump(values, Dumper=Dumper, allow_unicode=True), "utf-8")
        by_file = command.make_context("x", ["--config", str(tmp_path / "a.yaml"), "--", *files])
        by_flags = command.make_context("x", [*given(command, values), "--", *files])
        assert repr(sorted(by_file.params.items())) == repr(sorted(by_flags.params.items()))


# ------------------------------------------------------------------------------------------------ the same bits

METHODS = {
    "perpneg": ["--guidance.negatives", "a blue: square; 7", "--guidance.weights", "1;0.5"],
    "multi": ["--guidance.conds", "cond;a blue square", "--guidance.scales", "3;1"],
}
SHORT = ["--reward", "brightness", "--num_inference_steps", "2", "--seed", "3"]


def call(*words: Any) -> None:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == 0, (done.stderr[-500:], done.exception)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_run_goes_on_and_its_file_makes_it_again(method, model, tmp_path):
    """Resumed after one of two steps, and given to --config in another folder: the same weights, bit for bit."""
    start = ["train", "alignprop", "--model", model, *SHORT, "--train_batch_size", "1", "--guidance", method]
    start += [*METHODS[method], "--checkpointing_steps", "1", "--learning_rate", "0.01"]
    call(*start, "--max_train_steps", 1, "--output_dir", tmp_path / "a")
    call(*start, "--max_train_steps", 2, "--output_dir", tmp_path / "a", "--resume_from_checkpoint", "latest")
    call("train", "alignprop", "--config", tmp_path / "a/config.yaml", "--output_dir", tmp_path / "b")
    a, b = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any("lora_B" in key and value.any() for key, value in a.items())


@pytest.mark.parametrize(
    "words", [["optimize", "--iterations", "2"], ["search", "fk", "--nfe_budget", "20"]], ids=lambda w: w[0]
)
def test_the_file_of_a_folder_makes_the_same_pictures(words, model, tmp_path):
    prompts = ["--prompt", "a red: circle # 7\n", "'2020-01-01'"]
    given = ["--model", model, *SHORT, "--guidance", "perpneg", *METHODS["perpneg"]]
    call(*words, *given, *prompts, "--output_dir", tmp_path / "a")
    call(words[0], "--config", tmp_path / "a/config.yaml", "--output_dir", tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert len(names) > 2 and names == sorted(path.name for path in (tmp_path / "b").glob("*.png"))
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


# ------------------------------------------------------------------------------------------------ what wins

FILE = "model: tiny\nprompt: red\noutput_dir: out\nguidance: interval:apg\nguidance_scale: 3\n"


def chosen(tmp_path: Any, text: str, *words: str) -> dict[str, Any]:
    (tmp_path / "a.yaml").write_text(text)
    return guidance_of(COMMANDS[("sample",)].make_context("x", ["--config", str(tmp_path / "a.yaml"), *words]))[1]


def test_flags_win_over_the_file_by_either_name_of_the_scale(tmp_path):
    assert chosen(tmp_path, FILE) == {"scale": 3.0}
    assert chosen(tmp_path, FILE, "--guidance.scale", "4") == {"scale": 4.0}
    assert chosen(tmp_path, FILE, "--guidance_scale", "4") == {"scale": 4.0}
    assert chosen(tmp_path, FILE + "guidance.radius: none\nguidance.low: 1", "--guidance.low", "2") == {
        "scale": 3.0,
        "radius": None,
        "low": 2.0,
    }


def test_what_is_given_twice_is_refused(tmp_path):
    for text, words, name in [
        (FILE, ["--guidance.scale", "4", "--guidance_scale", "4"], "--guidance_scale and --guidance.scale"),
        (FILE + "guidance.scale: 4", [], "--guidance_scale and --guidance.scale"),
        (FILE + "guidance.low: 1\nguidance_options: {low: 2}", [], "guidance.low is given twice"),
        (FILE + "guidance_options: {low: 1, low: 2}", [], "the key 'low' is given twice"),
        (FILE, ["--seed", "1", "--seed=2"], "--seed is given 2 times"),
        (FILE, ["--steps", "1", "--num_inference_steps", "2"], "--num_inference_steps is given 2 times"),
        (FILE, ["--config", "a.yaml"], "--config is given 2 times"),
    ]:
        with pytest.raises(click.UsageError) as error:
            chosen(tmp_path, text, *words)
        assert name in error.value.message
