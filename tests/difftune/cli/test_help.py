"""`--help` of every command: groups, ranges, choices and an example, in the words of a shell."""

import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields

import click
import pytest
from click.testing import CliRunner

import difftune
from difftune.cli.command import Command, Number
from difftune.cli.program import cli
from difftune.configs.fields import GROUP_OF, GROUPS, OWN
from difftune.configs.images import CompareConfig, EvalConfig, SampleConfig
from difftune.pipelines.lora import LAYOUTS

PYTHON_WORDS = re.compile(r"\bNone\b|\bTrue\b|\bFalse\b|\[\"|guidance_options|\bdict\b|\bfloat32 or\b\(")


@pytest.mark.parametrize(
    ("name", "config"), [("sample", SampleConfig), ("eval", EvalConfig), ("compare", CompareConfig)]
)
def test_the_flags_of_the_commands_that_draw_are_the_fields_of_their_configs(name, config):
    flags = {param.name: param for param in cli.commands[name].params if param.expose_value}
    assert flags.keys() - {"as_json", "dry_run", "guidance_scale"} == {field.name for field in fields(config)}
    for field in fields(config):
        given = flags[field.name].to_info_dict()["default"]
        if field.default is not MISSING and given is not None:
            assert (tuple(given) if isinstance(field.default, tuple) else given) == field.default, field.name


def commands(group=cli, before=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


ALL = list(commands())


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_help_of_a_command(words, command):
    text = CliRunner().invoke(cli, [*words, "--help"]).output
    assert isinstance(command, Command)
    assert not PYTHON_WORDS.search(text), PYTHON_WORDS.search(text)
    *_, title, example = [line.strip() for line in text.rstrip().split("\n")]
    assert title == "Example:" and example == command.example
    program, *given = shlex.split(example)
    assert program == "difftune" and tuple(given[: len(words)]) == words
    command.make_context(words[-1], given[len(words) :])  # it can be read
    titles = re.findall(r"^(\S.*):$", text, re.M)
    assert titles[-1] == "Example" and set(titles[:-1]) <= {*GROUPS, OWN}
    for option in (param for param in command.params if isinstance(param, click.Option)):
        assert option.help and option.help.endswith("."), option.name
        if isinstance(option.type, Number):
            assert str(option.type.within) in " ".join(text.split()), option.name


def test_short_helps_are_whole_sentences_of_at_most_45_characters():
    for group in (cli, cli.commands["train"], cli.commands["rewards"]):
        for command in group.commands.values():
            assert command.short_help and command.short_help.endswith(".") and len(command.short_help) <= 45
    assert "..." not in CliRunner().invoke(cli, ["--help"]).output.replace("[ARGS]...", "")


def test_no_number_of_a_command_is_without_a_range():
    for _, command in ALL:
        assert not [p.name for p in command.params if p.type in (click.INT, click.FLOAT)]


def test_choices_are_those_of_the_family():
    names = next(p for p in cli.commands["train"].commands["alignprop"].params if p.name == "lora_layers").type.choices
    assert tuple(names) == tuple(LAYOUTS)


def test_every_grouped_name_is_a_flag():
    flags = {param.name for _, command in ALL for param in command.params}
    assert not GROUP_OF.keys() - flags


def test_help_loads_click_and_little_else():
    """0.2 s; a time would be that of the machine."""
    code = "import sys; from difftune.cli.program import cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert len(loaded) < 300
    assert not {"torch", "numpy", "diffusers", "transformers", "accelerate", "PIL", "yaml", "matplotlib"} & set(loaded)


def test_no_folder_of_the_package_bears_an_exported_name():
    """An imported submodule would shadow what is exported."""
    root = next(iter(difftune.__path__))
    from pathlib import Path

    modules = {path.stem for path in Path(root).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    same = {"models"}  # the module itself is what is exported
    assert modules & set(difftune.__all__) <= same
