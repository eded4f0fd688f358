"""docs/evidence.md and the README's table of claims, made of what was measured."""

import re
from collections.abc import Iterable, Mapping, Sequence

from benching import table

from evidence.rows import Claim, Results, Section

PAGE = "docs/evidence.md"
HEADING = "## What the papers claim, and what we measured"
README_ROWS = (  # in the README
    *("CFG++", "APG", "Rectified-CFG++", "adaptive guidance", "AlignProp against DDPO", "ReNO", "dts-star"),
)
INTRO = """# What the papers claim, and what we measured

`make evidence` makes this page: every number is of a measurement that it made, or that it found made with the same
settings and the same weights. It can be stopped at any time and goes on where it was. Verdicts are those of 95 %
intervals, over prompts: "holds" and "does not hold" where the interval says so, "not told apart" where it holds both.
"""


def page(sections: Mapping[str, Section], results: Results) -> str:
    """The page: all claims, then a part for each section, with its tables and what they took."""
    claims = [claim for section in sections.values() for claim in section.claims]
    parts = [INTRO, claims_table(claims) if claims else "Nothing was measured yet."]
    for name, section in sections.items():
        if section.text:
            parts += [f"## {section.title}", section.text, cost(name, section, results)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def claims_table(claims: Iterable[Claim]) -> str:
    rows = [[f"[{c.method}]({c.page})", c.paper, c.ours, c.verdict, f"`{c.command}`"] for c in claims]
    return table(["method", "the paper claims", "measured here, at equal cost", "verdict", "command"], rows)


def cost(name: str, section: Section, results: Results) -> str:
    """What made the section: the command, the seconds of its rows, and where they were measured."""
    entries = [entry for row in section.rows if (entry := results.entry(row))]
    seconds = sum(entry["seconds"] for entry in entries)
    places = ", ".join(sorted({entry["on"] for entry in entries}))
    return (
        f"`make evidence ROWS={name}`: {len(entries)} of {len(section.rows)} measurements, {seconds:.0f} s in all, "
        f"{seconds / max(len(entries), 1):.0f} s each in the mean; {places}."
    )


def navigation(text: str) -> str:
    """mkdocs.yml with the page beside the other measurements, where it is not yet."""
    group = "  - Measured:\n      - benchmarks.md\n      - evidence.md\n"
    return text.replace("  - Measured: benchmarks.md\n", group)


# ------------------------------------------------------------------------------------------------ the README


def readme(text: str, claims: Sequence[Claim]) -> str:
    """The README with a row for each claim that was measured in the place of that method's; others stay as they are.

    ValueError for a README without the table.
    """
    lines = text.split("\n")
    first = lines.index(HEADING) + 4 if HEADING in lines else len(text)
    if first >= len(lines) or not lines[first].startswith("|"):
        raise ValueError(f"the README has no table below {HEADING!r}")
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    measured = {name: claim for claim in claims if (name := readme_name(claim)) is not None}
    rows = [readme_row(measured[name]) if (name := named(row)) in measured else row for row in lines[first:last]]
    return "\n".join([*lines[:first], *rows, *lines[last:]])


NAMES = {"dts-star": "DTS*", "AlignProp against DDPO": "AlignProp"}  # of a claim in the README, where it is another


def readme_name(claim: Claim) -> str | None:
    return NAMES.get(claim.method, claim.method) if claim.method in README_ROWS else None


def named(row: str) -> str:
    """The method of a row: what its first link is called."""
    found = re.match(r"\| \[(.+?)\]\(", row)
    return found[1] if found else ""


def readme_row(claim: Claim) -> str:
    verdict = {True: "", False: "no: ", None: "not told apart: "}[claim.holds]
    cells = [
        f"[{NAMES.get(claim.method, claim.method)}](docs/{claim.page})",
        claim.paper,
        f"{verdict}{claim.ours} ([all](docs/evidence.md))",
        f"`{claim.command}`",
    ]
    return f"| {' | '.join(cells)} |"
