"""The page of methods and families, docs/guidance/matrix.md, from the tables of the tests.

    python scripts/make_matrix.py

Each cell is a test of tests/guidance/attach/test_matrix.py: "tested", a run of the family's pipeline under the method,
which changes the picture and repeats to the bit; or "refused", a run that ends in one sentence, whose reason stands
below.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guidance" / "matrix.md"
HEAD = """# Methods and families

Made by `python scripts/make_matrix.py` from the tables of `tests/guidance/attach/test_matrix.py`, where every cell is a
test on a small random pipeline of the family, called with guidance on. **tested**: the picture changes, and two runs
with one seed are alike to the bit. **refused**: one sentence that names both.
"""


def table(families: Sequence[str], methods: Iterable[str], refused: Mapping[tuple[str, str], str]) -> str:
    """Markdown: a line for each method, a column for each family."""
    lines = [f"| | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for method in methods:
        cells = ("refused" if (family, method) in refused else "tested" for family in families)
        lines.append(f"| [{method}]({method}.md) | {' | '.join(cells)} |")
    return "\n".join(lines)


def reasons(refused: Mapping[tuple[str, str], str]) -> str:
    """Why each cell is refused, families of one reason together."""
    why: dict[tuple[str, str], list[str]] = {}
    for (family, method), sentence in refused.items():
        why.setdefault((method, sentence.partition("; known")[0]), []).append(family)
    return "\n".join(
        f"- {method} on {', '.join(each)}: it {sentence}"
        if sentence.startswith("has")
        else f"- {method} on {', '.join(each)}: {sentence}"
        for (method, sentence), each in why.items()
    )


def page(families: Sequence[str], methods: Sequence[str], refused: Mapping[tuple[str, str], str]) -> str:
    """The whole page."""
    return f"""{HEAD}
{table(families, methods, refused)}

Refused, and what is said:

{reasons(refused)}
- null-text: the embeddings of one picture, in our own loop, or given to `attach` on sd and sdxl
- sana-sprint has no unconditional branch: methods that need `cond` alone go
- nag on qwen goes with the pipeline's own guidance off
"""


def made() -> str:
    """The page of the tests as they are."""
    sys.path.insert(0, str(ROOT))
    from tests.guidance.attach.test_matrix import METHODS, REFUSED, TESTED

    return page(TESTED, METHODS, REFUSED)


if __name__ == "__main__":
    PAGE.write_text(made())
