"""A Config as the YAML file that `--config` reads back: the same settings, so a run from it is bit-identical."""

from dataclasses import asdict
from typing import Any

import yaml

CONFIG = "config.yaml"  # in the folder of every run whose settings are a Config
OF_A_FOLDER = ("resume", "resume_from_checkpoint")  # whether to resume, which does not apply to a new run


def settings_yaml(config: Any) -> str:
    """The settings of a Config with the keys of the flags; those that are None are left out."""
    settings = {name: value for name, value in asdict(config).items() if name not in OF_A_FOLDER}
    options = {f"guidance.{key}": _plain(value) for key, value in settings.pop("guidance_options", {}).items()}
    given = {name: _plain(value) for name, value in settings.items() if value is not None}
    return yaml.dump(given | options, Dumper=Dumper, sort_keys=False, allow_unicode=True)


class Dumper(yaml.SafeDumper):
    """Double-quotes and escapes strings that hold CR, NEL, LS or PS, which YAML readers would turn into newlines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = any(end in text for end in "\r\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if quoted else None)


Dumper.add_representer(str, _text)


def _plain(value: Any) -> Any:
    """As YAML has it: a tuple is a list."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
