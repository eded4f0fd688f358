"""The values of --setting and --expert of `difftune search`, as a method's settings and as experts."""

from typing import Any, get_args, get_type_hints

from difftune.configs.search import SearchConfig
from difftune.errors import UserError
from difftune.lookup import known
from guidance.search.catalogue import SEARCHES
from guidance.search.fkc import Exponents

WORDS = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}


def method_settings_of(config: SearchConfig) -> dict[str, Any]:
    """The method's own settings, each in its field's type."""
    make = SEARCHES[known("search method", config.method, SEARCHES)].config
    hints, found = get_type_hints(make), {}
    for pair in config.setting or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--setting {pair} has no value: write it KEY=VALUE")
        if name in found:
            raise UserError(f"--setting {name} is given twice: give it once")
        found[name] = typed(name, value, hints[known(f"setting of {config.method}", name, make.__dataclass_fields__)])
    return found


def experts_of(config: SearchConfig) -> dict[str, str]:
    """The prompts of further experts, by name."""
    found = {}
    for pair in config.expert or []:
        name, equals, prompt = pair.partition("=")
        if not name or not equals:
            raise UserError(f"--expert {pair} has no name: write it NAME=PROMPT")
        if name in found:
            raise UserError(f"--expert {name} is given twice: give each its own name")
        found[name] = prompt
    return found


def typed(name: str, value: str, hint: Any) -> Any:
    """A setting in its field's type: none is None, and a field of several types takes the first that fits."""
    kinds = get_args(hint) or (hint,)
    if value.lower() == "none" and type(None) in kinds:
        return None
    if Exponents in kinds:
        return exponents(name, value)
    for kind in [kind for kind in (int, float) if kind in kinds]:
        try:
            return kind(value)
        except ValueError:
            continue
    if bool in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not {int, float, bool} & set(kinds):
        return value  # a name, which the method checks
    raise UserError(f"--setting {name}={value} is not {' or '.join(WORDS[kind] for kind in kinds)}")


def exponents(name: str, value: str) -> dict[str, float]:
    """Experts' exponents, written cond:2,uncond:-1."""
    pairs = [pair.rpartition(":") for pair in value.split(",")]
    try:
        found = {expert.strip(): float(number) for expert, _, number in pairs}
    except ValueError:
        raise UserError(f"--setting {name}={value} is not a list of exponents: write it cond:2,uncond:-1") from None
    if len(found) < len(pairs):
        raise UserError(f"--setting {name}={value} names an expert twice: give each one exponent")
    return found
