"""The page of methods and families, docs/guidance/matrix.md, from the tables of the tests.

    python scripts/make_matrix.py

Each cell is a case of tests/guidance/attach/test_matrix.py: "tested", a run of the family's pipeline under the method,
which changes the picture and repeats to the bit; or "refused", a run that ends in the sentence that stands below.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guidance" / "matrix.md"
HEAD = """# Methods and families

Made by `python scripts/make_matrix.py` from the tables of `tests/guidance/attach/test_matrix.py`, which has a case for
every cell, on a small random pipeline of the family that is called with guidance on: a third of them run in
`make test`, all in `make test-slow`. **tested**: the picture changes, and two runs with one seed are alike to the bit.
**refused**: the run ends in the sentence below, which names the method and the family or its pipeline.
"""
FOOT = """## Not in the table

- null-text: its embeddings are those of one picture, in our own loop, or given to `attach` on sd and sdxl.
- sana-sprint has no unconditional branch: methods that need `cond` alone go, in
  `tests/guidance/methods/test_conformance.py`.
- nag on qwen goes with the pipeline's own guidance off, in `tests/solvers/families/test_joint.py`.
- gfcg, classifier and dynamic have a function of x0 in the place of a classifier, autoguidance a weaker copy of the
  network; fbg, ag and interval have settings that make them act in so short a run; cfg-zero has `zero_steps=0` on sd,
  sdxl and pixart-sigma, which are no flows.
"""


def table(families: Sequence[str], methods: Iterable[str], refused: Mapping[tuple[str, str], str]) -> str:
    """Markdown: a line for each method, a column for each family."""
    lines = [f"| | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for method in methods:
        cells = ("refused" if (family, method) in refused else "tested" for family in families)
        lines.append(f"| [{method}]({method}.md) | {' | '.join(cells)} |")
    return "\n".join(lines)


def sentences(refused: Mapping[tuple[str, str], str]) -> str:
    """What is said in each cell that is refused."""
    return "\n".join(f"- {method} on {family}: {sentence}." for (family, method), sentence in refused.items())


def page(families: Sequence[str], methods: Sequence[str], refused: Mapping[tuple[str, str], str]) -> str:
    """The whole page."""
    return f"{HEAD}\n{table(families, methods, refused)}\n\n## What is said\n\n{sentences(refused)}\n\n{FOOT}"


def made() -> str:
    """The page of the tests as they are."""
    sys.path.insert(0, str(ROOT))
    from tests.guidance.attach.test_matrix import METHODS, REFUSED, TESTED

    return page(TESTED, METHODS, REFUSED)


if __name__ == "__main__":
    PAGE.write_text(made())
