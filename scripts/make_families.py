"""Write the tables of docs/families.md from the tests' own tables: what is tested, on what, for every family.

python scripts/make_families.py
"""

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from difftune.files.output import write  # noqa: E402
from difftune.pipelines import lora_kohya  # noqa: E402
from solvers.families.table import FAMILIES, REFUSED  # noqa: E402
from tests.guidance.methods import test_conformance  # noqa: E402
from tests.solvers.families import test_families  # noqa: E402
from tests.support.families import EVERY  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- made by scripts/make_families.py -->", "<!-- end of what is made -->"
SMALL, NO = "small", "no"
UNETS = ("sd", "sdxl")


def family_named(case: str) -> str:
    """The family of a case of the tests, whose name begins with it."""
    return max((name for name in FAMILIES if case.startswith(name)), key=len, default="")


def tested(cases: Iterable[str]) -> set[str]:
    return {family_named(case) for case in cases}


def uses() -> dict[str, set[str]]:
    """The families that each use is tested on."""
    attached = tested((*test_conformance.KINDS, *test_conformance.ALONE))
    known = tested((*test_families.FULL, *test_families.FEW_STEPS))
    every = set(EVERY)
    return {"`attach`": attached, "`LatentModel`": known, "training": every, "search": every, "ReNO": every}


def row_of(name: str) -> list[str]:
    """A family's cells."""
    cells = [SMALL if name in families else NO for families in uses().values()]
    patches = ", ".join(FAMILIES[name].patches) or "none"
    kohya = "kohya, comfyui" if name in (*UNETS, *lora_kohya.LAYOUTS) else "comfyui"
    return [f"`{name}`", *cells, patches, kohya]


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
