"""Write the line **Families.** of every page of a method, a recipe, a search and of ReNO from the cases of the tests.

python scripts/make_family_lines.py
"""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
from difftune.files.output import write  # noqa: E402
from difftune.recipes import RECIPES  # noqa: E402
from guidance.methods.catalogue import GUIDANCE  # noqa: E402
from scripts.make_defaults import example_of  # noqa: E402
from scripts.make_families import TRAINED, family_named, uses  # noqa: E402
from solvers.families.table import FAMILIES  # noqa: E402
from tests.guidance.attach.test_matrix import METHODS, REFUSED, TESTED  # noqa: E402

DOCS = ROOT / "docs"
HEAD = "**Families.** "
LINE = re.compile(r"^\*\*Families\.\*\* .*$", re.MULTILINE)
MODEL = re.compile(r'--(?:model|config) (tiny[\w-]*)|load_model\("(tiny[\w-]*)"\)|model="(tiny[\w-]*)"')
MODELS = ("tiny", "tiny-flow", "tiny-turbo")  # those that draw, of the embedded ones
NULL_TEXT = ("sd", "sdxl")  # tests/guidance/test_invert.py


def line(page: str, small: Iterable[str], refused: Mapping[str, str], by: str = "") -> str:
    """The line of a page: the models of its commands, the families that are tested, refused with the reason, or not
    tested; `by` says with what."""
    parts = [f"Trained models: {', '.join(TRAINED)} ({', '.join(f'`{name}`' for name in models_of(page))})."]
    known = set(small) - {*TRAINED, *refused}
    if known:
        parts.append(f"Small random checkpoints{by}: {', '.join(in_order(known))}.")
    reasons = dict.fromkeys(refused.values())
    each = [f"{', '.join(in_order(f for f in refused if refused[f] == why))} ({why})" for why in reasons]
    parts += [f"Refused: {'; '.join(each)}."] if each else []
    if rest := set(FAMILIES) - known - {*TRAINED, *refused}:
        parts.append(f"Not tested{by}: {', '.join(in_order(rest))}.")
    return HEAD + " ".join(parts)


def models_of(page: str) -> list[str]:
    """The embedded models that the commands of a page draw with."""
    named = {name for groups in MODEL.findall((DOCS / f"{page}.md").read_text()) for name in groups if name}
    named |= {model_of(name) for name in named if name.removeprefix("tiny-") in RECIPES}
    return [name for name in MODELS if name in named] or ["tiny"]


def model_of(example: str) -> str:
    """The model of an example of settings."""
    recipe = RECIPES[example.removeprefix("tiny-")]
    return example_of(recipe).get("model", recipe.config().model)


def in_order(families: Iterable[str]) -> list[str]:
    found = set(families)
    return [name for name in FAMILIES if name in found]


def of_method(name: str) -> str:
    """The line of a guidance method's page."""
    if name not in METHODS:
        return line(f"guidance/{name}", NULL_TEXT, {})
    refused = {family_named(kind): reason(REFUSED[kind, name]) for kind in TESTED if (kind, name) in REFUSED}
    return line(f"guidance/{name}", map(family_named, TESTED), refused)


def reason(sentence: str) -> str:
    """A refusal in a few words: without the remedy, and of a patch that the family lacks its name alone."""
    patch = re.search(r"no patch '\w+'", sentence)
    return patch[0] if patch else sentence.partition(":")[0]


def lines() -> dict[str, str]:
    """The line of every page, by its path below docs."""
    tested = uses()
    made = {f"guidance/{name}": of_method(name) for name in GUIDANCE}
    for recipe in RECIPES.values():
        page = f"recipes/{recipe.name}"
        made[page] = line(page, recipe.facts.families.split(), {}, " with this recipe")
    for page in ("baselines", "fkc", "steering", "trees"):
        made[f"search/{page}"] = line(f"search/{page}", tested["search"], {}, " with `fk`")
    return made | {"reno": line("reno", tested["ReNO"], {})}


def renewed(text: str, new: str) -> str:
    """The page with its line, which is put before the second heading where there is none yet."""
    if LINE.search(text):
        return LINE.sub(lambda _: new, text, count=1)
    before, heading, after = text.partition("\n## ")
    return f"{before.rstrip()}\n\n{new}\n{heading}{after}"


def main() -> None:
    for page, new in lines().items():
        file = DOCS / f"{page}.md"
        write(file, renewed(file.read_text(), new).encode())


if __name__ == "__main__":
    main()
