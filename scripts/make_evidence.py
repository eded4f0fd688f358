"""Measures what stands on docs/evidence.md, and writes the page, its place in mkdocs.yml and the README's table.

    python scripts/make_evidence.py [search noise training guidance peers] [--part I/N] [--quick] [--folder FOLDER]
        [--plan] [--only TEXT] [--seeds 0 1 2] [--budgets 250 1000 10000] [--prompts 40] [--recipes NAME ...] [--cap S]

Each measurement is a small file below FOLDER (runs/evidence), written whole; one that was made with the same settings
and the same weights is not made again, so that the command can be stopped and goes on. Processes side by side take a
part each. --plan says what is there and what is not, with the seconds that each took. --quick makes every measurement
in small numbers, below runs/evidence_quick, and writes the page there.

The page tells what was measured by now; the README's rows change as their claims are measured.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
from benching import table  # noqa: E402
from evidence import guidance, noise, page, peers, search, training  # noqa: E402
from evidence.rows import Results, Section, part_of  # noqa: E402

from difftune.files.output import write  # noqa: E402
from rewards.world.grammar import HARD_CATEGORIES  # noqa: E402

PARTS: dict[str, ModuleType] = {
    "guidance": guidance,
    "search": search,
    "noise": noise,
    "training": training,
    "peers": peers,
}


def sizes(given: argparse.Namespace) -> dict[str, Any]:
    """The size of each section, with what was given in the place of its own."""
    found = {name: part.QUICK if given.quick else part.Size() for name, part in PARTS.items()}
    for name, value in (("seeds", given.seeds), ("budgets", given.budgets), ("recipes", given.recipes)):
        if value is not None:
            found = {n: s._replace(**{name: tuple(value)}) if name in s._fields else s for n, s in found.items()}
    if given.prompts is not None:
        found["search"] = found["search"]._replace(prompts=given.prompts)
        found["noise"] = found["noise"]._replace(
            part=replace(found["noise"].part, prompts=-(-given.prompts // len(HARD_CATEGORIES)))
        )
    if given.cap is not None:
        found["training"] = found["training"]._replace(cap=given.cap)
        found["noise"] = found["noise"]._replace(cap=given.cap)
    return found


def sections(chosen: Mapping[str, Any], results: Results) -> dict[str, Section]:
    return {name: PARTS[name].section(size, results) for name, size in chosen.items()}


def measure(name: str, size: Any, results: Results, part: str, only: str) -> list[str]:
    """Make what is missing of a section. Returns the names of what failed, of which the reason is printed."""
    rows = [row for row in PARTS[name].section(size, results).rows if only in row.name]
    todo, failed = [row for row in part_of(rows, part) if results.read(row) is None], []
    for i, row in enumerate(todo, 1):
        try:
            results.measured(row)
        except (Exception, SystemExit) as error:  # the others are measured all the same
            failed.append(row.name)
            print(f"{name} {i} of {len(todo)}: {row.name} failed: {error}", flush=True)
            continue
        entry = results.entry(row)
        print(f"{name} {i} of {len(todo)}: {row.name}, {entry['seconds'] if entry else 0} s", flush=True)
    return failed


def planned(found: Mapping[str, Section], results: Results) -> str:
    """A row for each kind of measurement: how many there are, and the seconds of those that were made."""
    counts: dict[tuple[str, str], list[float | None]] = defaultdict(list)
    for name, section in found.items():
        for row in section.rows:
            entry = results.entry(row)
            counts[name, kind(row.name)].append(entry["seconds"] if entry else None)
    rows = []
    for (name, of), values in counts.items():
        made = [value for value in values if value is not None]
        mean = f"{sum(made) / len(made):.1f}" if made else "-"
        rows.append([name, of, len(values), len(made), f"{sum(made):.0f}", mean])
    return table(["section", "measurement", "in all", "made", "seconds", "seconds of one"], rows)


def kind(name: str) -> str:
    """A row's name without its section and its numbers at the end."""
    words = name.rpartition("/")[2].split("-")
    while len(words) > 1 and words[-1].replace(".", "").isdigit():
        words.pop()
    return "-".join(words)


def main(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # so that seconds are one thread's
    folder = given.folder or ROOT / ("runs/evidence_quick" if given.quick else "runs/evidence")
    results, chosen = Results(folder), sizes(given)
    failed = []
    for name in given.rows if not given.plan else ():
        failed += measure(name, chosen[name], results, given.part, given.only)
    found = sections(chosen, results)
    print(planned({name: found[name] for name in given.rows}, results))
    if given.plan:
        return
    target = folder if given.quick else ROOT
    write(target / page.PAGE, page.page(found, results))
    claims = [claim for section in found.values() for claim in section.claims]
    write(target / "README.md", page.readme((ROOT / "README.md").read_text(), claims))
    write(target / "mkdocs.yml", page.navigation((ROOT / "mkdocs.yml").read_text()))
    print(f"wrote {target / page.PAGE} and {target / 'README.md'}")
    if failed:
        raise SystemExit(f"failed, for the reasons above: {', '.join(failed)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"sections to measure: {', '.join(PARTS)}; all without them")
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts of the measurements")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only what has this in its name")
    parser.add_argument("--quick", action="store_true", help="every measurement in small numbers")
    parser.add_argument("--plan", action="store_true", help="measure nothing, say what there is")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="of search, noise, training and peers")
    parser.add_argument("--budgets", type=int, nargs="+", help="evaluations of a prompt in search")
    parser.add_argument("--prompts", type=int, help="of search and noise, as many of each category of ShapeEval-hard")
    parser.add_argument("--recipes", nargs="+", choices=training.Size().recipes)
    parser.add_argument("--cap", type=float, help="seconds of a training, the noise hypernetwork's among them")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(PARTS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    arguments.rows = arguments.rows or list(PARTS)
    main(arguments)
