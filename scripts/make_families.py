"""Write the tables of docs/families.md from the cases of the tests: what is tested, on what, for every family.

python scripts/make_families.py
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from difftune.files.output import write  # noqa: E402
from difftune.pipelines import lora_formats, lora_kohya  # noqa: E402
from solvers.families.table import FAMILIES, REFUSED  # noqa: E402
from tests.difftune.recipes import test_every_family  # noqa: E402
from tests.difftune.reno import test_reno_families  # noqa: E402
from tests.guidance.methods import test_conformance  # noqa: E402
from tests.solvers.families import test_families  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- made by scripts/make_families.py -->", "<!-- end of what is made -->"
SMALL, NO = "small", "no"
TRAINED = ("sd",)  # the models that come with difftune
UNETS = ("sd", "sdxl")
SPRINT = "test_sana_sprint_without_a_second_branch"


def family_named(case: str) -> str:
    """The family of a case of the tests, whose name begins with it."""
    return max((name for name in FAMILIES if case.startswith(name)), key=len, default="")


def tested(cases: Iterable[str]) -> set[str]:
    return {family_named(case) for case in cases}


def cases(module: ModuleType, test: str, argument: str = "name") -> set[str]:
    """The families among the values of a test's argument, by its `parametrize`; none of a test that is not there."""
    found: list[str] = []
    for mark in getattr(getattr(module, test, None), "pytestmark", ()):
        names = [name.strip() for name in mark.args[0].split(",")] if mark.name == "parametrize" else []
        if argument in names:
            values = [getattr(value, "values", value) for value in mark.args[1]]  # of a pytest.param, or plain
            found += [v if isinstance(v, str) else v[names.index(argument)] for v in values]
    return tested(found)


def uses() -> dict[str, set[str]]:
    """The families that each use is tested on."""
    stock = "test_cfg_is_the_stock_pipeline_and_detach_restores_it"
    alone = {"sana-sprint"} if hasattr(test_conformance, SPRINT) else set()
    own, few = (
        cases(test_families, test) for test in ("test_own_loop_is_the_pipeline", "test_few_steps_without_guidance")
    )
    trained = [cases(test_every_family, test) for test in ("test_a_step_of_training", "test_a_step_on_given_pictures")]
    return {
        "`attach`": cases(test_conformance, stock, "kind") | alone,
        "`LatentModel`": own | few,
        "training": set.intersection(*trained),
        "search": cases(test_every_family, "test_a_search"),
        "ReNO": cases(test_reno_families, "test_noise_and_embedding_are_optimised"),
    }


def row_of(name: str) -> list[str]:
    """A family's cells."""
    on = f"{SMALL}, trained" if name in TRAINED else SMALL
    cells = [on if name in families else NO for families in uses().values()]
    patches = ", ".join(FAMILIES[name].patches) or "none"
    known = {"kohya": lora_kohya.LAYOUTS, "comfyui": lora_formats.MAPPED}
    export = [layout for layout, families in known.items() if name in (*UNETS, *families)]
    return [f"`{name}`", *cells, patches, ", ".join(export) or NO]


def block() -> str:
    """The tables as they stand in the page."""
    heads = ["family", *uses(), "patches", "export"]
    lines = [heads, ["---"] * len(heads), *map(row_of, FAMILIES)]
    refused = [["refused", "because"], ["---"] * 2, *([f"`{name}`", why] for name, why in REFUSED.items())]
    tables = ["\n".join(f"| {' | '.join(line)} |" for line in table) for table in (lines, refused)]
    return "\n\n".join([BEGIN, *tables, END])


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    write(PAGE, (before + block() + rest.partition(END)[2]).encode())


if __name__ == "__main__":
    main()
