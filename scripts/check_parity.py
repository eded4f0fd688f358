"""Compares our rewards with the models that they come from: on their published weights, and on small random ones.

    python scripts/check_parity.py [REWARD ...] [--data FOLDER] [--output FILE]
    python scripts/check_parity.py --random [REWARD ...] --output docs/parity.md

Without --random, the weights of each published checkpoint are fetched and verified (`difftune rewards prefetch`), and
the pictures that its authors show are scored, and random ones. Compared are the scores that they print, and what their
package gives if it is installed, or the code of the model's card. The pictures are fetched into --data, and known by
their hashes. With --random nothing is fetched: a small random checkpoint of the published layout is made, and compared
with a forward by another library, or one that is written out. The rows are printed, and written as the table of the
docs; the exit status is 1 if one disagrees.
"""

import argparse
import hashlib
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from parity.cases import CASES, OCEAN, PICTURES, Case  # noqa: E402

from rewards import hub  # noqa: E402
from rewards.checks import png  # noqa: E402
from rewards.errors import RewardError  # noqa: E402
from rewards.learned.reference import opened  # noqa: E402
from rewards.registry import Reward, load  # noqa: E402
from tests.support.references import CHECKPOINTS  # noqa: E402

DATA = Path("~/.cache/difftune/parity").expanduser()
RANDOM = 4  # random pictures
SIDE = 512  # of them, in pixels
SAME = 2e-5  # of scores by small random networks in float32, as a share of the largest
PROMPTS = ("a red circle", "a blue square", "a red square", "a blue circle")  # words that their vocabularies have


class Row(NamedTuple):
    """One comparison."""

    reward: str
    weights: str  # "random", or the revisions of published ones
    against: str  # what is compared with
    gap: float | None = None  # the largest difference; None: nothing was compared
    most: float = 0.0  # what it may be
    why: str = ""  # nothing was compared

    @property
    def agrees(self) -> bool | None:
        return None if self.gap is None else self.gap <= self.most


# ------------------------------------------------------------------------------------------------ pictures


def fetch_picture(folder: Path, name: str) -> Path:
    """The picture of that name in a folder, fetched if it is not there. RewardError if it has another hash."""
    url, digest = PICTURES[name]
    file = folder / name
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                file.write_bytes(answer.read(2**24))
        except OSError as error:
            raise RewardError(f"cannot fetch {url}: {error}") from error
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise RewardError(f"{file} is not the picture that was published: remove it")
    return file


def random_pictures(folder: Path, count: int = RANDOM, side: int = SIDE) -> list[Path]:
    """Pictures of coloured noise, smooth to rough, as PNG."""
    files = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        noise = torch.rand(1, 3, 4 ** (i + 1), 4 ** (i + 1), generator=generator)
        x = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)[0]
        files.append(folder / f"random{i}.png")
        files[-1].write_bytes(png((x.permute(1, 2, 0) * 255).round().byte().numpy()))
    return files


@torch.no_grad()
def scores_of(reward: Reward, files: Sequence[Path], prompts: Sequence[str]) -> Tensor:
    """Our scores, in float64."""
    pairs = zip(files, prompts, strict=True)
    return torch.cat([reward(opened(file)[None], [prompt]) for file, prompt in pairs]).double().cpu()


# ------------------------------------------------------------------------------------------------ published weights


def compare(case: Case, data: Path, random: Sequence[Path], **options: Any) -> list[Row]:
    """Score the pictures of a case, and random ones, and compare; a row for each of what there is to compare with.

    options: of the reward, beside those in its name; where weights are among them, none are fetched.
    """
    name, own = with_pictures(case, data), "weights" in options
    if not own:
        hub.prefetch(name)
    reward = load(name, **options)
    files = [fetch_picture(data, file) for file in case.pictures]
    named = "" if own else ", ".join(f"{k}@{v[:8]}" for k, v in hub.revisions(name).items())
    weights, rows = f"published {named}".strip(), []
    if case.printed:
        found = gap(case.of_scores(scores_of(reward, files, case.prompts)), case.printed)
        rows.append(Row(case.reward, weights, "the scores that its authors print", found, case.tolerance))
    if case.theirs is not None and installed(case.package):
        shown, words = [*files, *random], [*case.prompts, *[OCEAN] * len(random)]
        found = gap(scores_of(reward, shown, words), case.theirs(shown, words))
        version = metadata.version(case.package)
        rows.append(Row(case.reward, weights, f"{case.package} {version}", found, case.tolerance))
    return rows or [Row(case.reward, weights, case.package, why=f"{case.package} is not installed")]


def with_pictures(case: Case, data: Path) -> str:
    """The reward's name with the pictures that are its options."""
    options = ", ".join(f"{option}={fetch_picture(data, file)}" for option, file in case.options.items())
    return f"{case.reward}[{options}]" if options else case.reward


def installed(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def gap(ours: Tensor, theirs: Sequence[float]) -> float:
    """The largest difference."""
    return float((ours - torch.tensor(theirs, dtype=torch.float64)).abs().max())


def published(cases: Sequence[Case], data: Path) -> list[Row]:
    """The rows of the published weights; a case that cannot be had is a row that says why."""
    rows = []
    with TemporaryDirectory() as folder:
        random = random_pictures(Path(folder))
        for case in cases:
            try:
                rows += compare(case, data, random)
            except (RewardError, OSError) as error:
                print(f"check_parity: {case.reward} is left out: {error}", file=sys.stderr)
                rows.append(Row(case.reward, "published", wanted(case), why="not scored: its weights are not here"))
    return rows


def wanted(case: Case) -> str:
    """What published weights of a case can be compared with."""
    return " and ".join(
        ["the scores that its authors print"] * bool(case.printed) + [case.package] * bool(case.package)
    )


# ------------------------------------------------------------------------------------------------ random weights


@torch.no_grad()
def compare_random(name: str) -> Row:
    """A small random checkpoint under our reward of that name and under a forward that is not ours."""
    with TemporaryDirectory() as folder:
        made = CHECKPOINTS[name](Path(folder))
        (pictures := Path(folder) / "pictures").mkdir()
        files = random_pictures(pictures, len(PROMPTS), made.side)
        with patch.object(hub, "snapshot", lambda *_, **__: made.hub) if made.hub else nullcontext():
            ours = scores_of(load(name, **made.options), files, PROMPTS)
        theirs = [float(made.forward(file, prompt)) for file, prompt in zip(files, PROMPTS, strict=True)]
    if ours.unique().numel() < len(ours):
        raise RewardError(f"the random checkpoint of {name} gives equal scores, which compare nothing")
    return Row(name, "random", made.against, gap(ours, theirs), SAME * float(ours.abs().max()))


# ------------------------------------------------------------------------------------------------ the page

HEAD = """# Parity

Written by `python scripts/check_parity.py{flag}`. Each reward with weights of its own is compared with the model that
it comes from.

- **random**: a small random checkpoint in the published layout, scored by our reward, and by another library's model or
  a forward that is written out, on four prompts and four pictures of the size that the network sees, so that no
  resize is compared; only those of `hps-v3` are resized, on both sides.
- **published**: the published weights, on the pictures whose scores the authors print and on random ones, against these
  scores and the authors' own package (or the code of the model's card), if it is installed.

"""
WORDS = {True: "agrees", False: "**DISAGREES**"}


def table(rows: Sequence[Row]) -> str:
    """The rows in markdown."""
    lines = ["| reward | weights | compared with | largest difference | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        number = "" if row.gap is None else f"{row.gap:.1g}"
        said = row.why if row.agrees is None else f"{WORDS[row.agrees]} (within {row.most:.1g})"
        lines.append(f"| `{row.reward}` | {row.weights} | {row.against} | {number} | {said} |")
    return "\n".join(lines) + "\n"


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these rewards, or all."""
    unknown = set(names) - {case.name for case in CASES} - {case.reward for case in CASES}
    if unknown:
        sys.exit(f"check_parity: no case {min(unknown)!r}; there are {', '.join(case.name for case in CASES)}")
    return [case for case in CASES if not names or {case.name, case.reward} & set(names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", nargs="*", help="those that are compared; all if none is named")
    parser.add_argument("--random", action="store_true", help="small random checkpoints, in place of published ones")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the published pictures")
    parser.add_argument("--output", type=Path, help="where the page is written")
    given = parser.parse_args()
    cases = chosen(given.reward)
    if given.random:
        rows = [compare_random(case.name) for case in cases]
        rows += [Row(case.reward, "published", wanted(case), why="not scored here") for case in cases]
    else:
        rows = published(cases, given.data)
    print(table(rows))
    if given.output is not None:
        given.output.write_text(HEAD.replace("{flag}", " --random" if given.random else "") + table(rows))
    return int(any(row.agrees is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
