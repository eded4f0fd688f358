"""What an evaluation found: the scores of its pictures, as JSON, and compared with an earlier one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from difftune.errors import UserError
from difftune.evaluation.drawn import PICTURES, EvalImage
from difftune.evaluation.intervals import Estimate, estimate
from difftune.evaluation.paired import LEVEL, Change, compare_prompts, holm
from difftune.evaluation.trained import is_trained
from difftune.files.text import parse_json, read_text
from rewards import hub
from rewards.registry import entry

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the pictures' scores


@dataclass(frozen=True)
class Evaluated:
    """Pictures and their scores, of this evaluation or of an earlier one."""

    images: Sequence[EvalImage]
    scores: Mapping[str, Sequence[float]]  # by reward, one for each picture
    pictures: Path | None = None  # their folder, if they are kept
    trained: frozenset[str] | None = frozenset()  # rewards that the model was trained on; None: it is not known

    def means(self, reward: str, keys: set[tuple[str, int]] | None = None) -> dict[str, float]:
        """The mean score of each prompt, over all its pictures or those of `keys` (prompt, seed)."""
        found: dict[str, list[float]] = {}
        for image, score in zip(self.images, self.scores[reward], strict=True):
            if keys is None or (image.prompt, image.seed) in keys:
                found.setdefault(image.prompt, []).append(score)
        return {prompt: float(np.mean(scores)) for prompt, scores in found.items()}

    @property
    def keys(self) -> set[tuple[str, int]]:
        return {(image.prompt, image.seed) for image in self.images}

    @property
    def categories(self) -> dict[str, str]:
        return {image.prompt: image.category for image in self.images}


def read_evaluated(path: str | Path) -> Evaluated:
    """An earlier evaluation, from its eval.json or what `difftune eval --json` printed; ShapeEval's verdicts are scores
    of the oracle."""
    try:
        about = parse_json(read_text(path, "--baseline"))
        listed = about["images"]
        images = [EvalImage(i.get("file", ""), i["prompt"], i["category"], int(i["seed"])) for i in listed]
        scores = [{**i.get("scores", {}), **({"oracle": bool(i["holds"])} if "holds" in i else {})} for i in listed]
        names = set.intersection(*map(set, scores))
        found = {name: [float(row[name]) for row in scores] for name in sorted(names)}
        trained = None if about.get("trained_on", []) is None else frozenset(map(str, about.get("trained_on", [])))
        folder = about.get("pictures")
    except UserError:
        raise
    except (RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not an evaluation ({why}): give what `difftune eval --json` printed") from error
    places = [Path(path).parent / PICTURES, *([Path(folder)] if isinstance(folder, str) else [])]
    pictures = next((place for place in places if images[0].file and (place / images[0].file).is_file()), None)
    return Evaluated(images, found, pictures, trained)


# ------------------------------------------------------------------------------------------------ pairs


class Pairs(NamedTuple):
    """The prompts that two evaluations share, and over which pictures their means are."""

    prompts: list[str]
    keys: set[tuple[str, int]] | None  # (prompt, seed) that both have; None: they share no seed, so all pictures count

    @property
    def by(self) -> str:
        return "prompt" if self.keys is None else "prompt and seed"


def pair_up(now: Evaluated, then: Evaluated) -> Pairs:
    """What the two share: prompts with seeds, or prompts alone. UserError if they share no prompt."""
    keys = now.keys & then.keys
    shared = {prompt for prompt, _ in keys} or now.categories.keys() & then.categories.keys()
    if not shared:
        raise UserError("the baseline shares no prompt with this run: evaluate both with the same --prompts")
    return Pairs([prompt for prompt in now.categories if prompt in shared], keys or None)


def change_of(now: Evaluated, then: Evaluated, pairs: Pairs, reward: str, category: str | None = None) -> Change:
    """The change of a reward over the shared prompts, or over those of a category, of which there must be some."""
    after, before = now.means(reward, pairs.keys), then.means(reward, pairs.keys)
    prompts = [p for p in pairs.prompts if category is None or now.categories[p] == category]
    bounds = None if bounds_of(reward) is None else (-1.0, 1.0)
    return compare_prompts(
        [after[p] for p in prompts], [before[p] for p in prompts], bounds, entry(reward).higher_is_better
    )


def bounds_of(reward: str) -> tuple[float, float] | None:
    """The bounds of a reward that is a probability or a share; other rewards' ranges are only what is usual."""
    return (0.0, 1.0) if entry(reward).range == (0, 1) else None


# ------------------------------------------------------------------------------------------------ as JSON


def summarise(now: Evaluated, then: Evaluated | None) -> dict[str, Any]:
    """The contents of eval.json about the rewards: each one's means, and its change if there is a baseline.

    A difference counts if its interval leaves out 0 and its p value, adjusted by Holm, is at most `LEVEL`: of few
    prompts the bootstrap's interval alone is too narrow. Those of categories are not adjusted, and none counts.
    """
    pairs = None if then is None else pair_up(now, then)
    found = {name: reward_summary(now, name) for name in now.scores}
    if then is None or pairs is None:
        return {"rewards": found}
    changes = {name: change_of(now, then, pairs, name) for name in now.scores}
    adjusted = holm({name: change.p for name, change in changes.items()})
    for name, change in changes.items():
        found[name]["difference"] = {
            **difference_of(change),
            "counts": change.difference.excludes_zero and adjusted[name] <= LEVEL,
            "p_holm": adjusted[name],
        }
        found[name]["win_rate"] = asdict(change.wins)
        found[name]["baseline"] = as_numbers(mean_of(then, name, pairs))
        for kind in found[name]["categories"].keys() & {now.categories[prompt] for prompt in pairs.prompts}:
            found[name]["categories"][kind]["difference"] = difference_of(change_of(now, then, pairs, name, kind))
    return {"rewards": found, "paired_by": pairs.by, "comparisons": len(changes)}


def reward_summary(now: Evaluated, reward: str) -> dict[str, Any]:
    """A reward's mean, over all prompts and by category, and what a reader must know of it."""
    about, means = entry(reward), now.means(reward)
    names = [name for name in dict.fromkeys(now.categories.values()) if name]
    of_kind = {name: [means[p] for p in means if now.categories[p] == name] for name in names}
    return {
        "overall": counted(list(means.values()), reward),
        "categories": {name: counted(values, reward) for name, values in of_kind.items()},
        "quantiles": dict(zip(map(str, QUANTILES), np.quantile(now.scores[reward], QUANTILES).tolist(), strict=True)),
        "trained_on": None if now.trained is None else is_trained(reward, now.trained),
        "higher_is_better": about.higher_is_better,
        "comparable_across_prompts": about.comparable_across_prompts,
        "licence": about.licence,
        "noncommercial": about.noncommercial,
        "revisions": hub.revisions(reward),
    }


def counted(means: Sequence[float], reward: str) -> dict[str, Any]:
    """The mean of these prompts' means, and their number."""
    return {**as_numbers(estimate(means, bounds_of(reward))), "n_prompts": len(means)}


def difference_of(change: Change) -> dict[str, Any]:
    return {**as_numbers(change.difference), "p": change.p, "n_prompts": change.wins.n}


def mean_of(found: Evaluated, reward: str, pairs: Pairs) -> Estimate:
    """The mean over the shared prompts."""
    means = found.means(reward, pairs.keys)
    return estimate([means[prompt] for prompt in pairs.prompts], bounds_of(reward))


def as_numbers(e: Estimate) -> dict[str, float | None]:
    """An estimate as JSON has it: a bound that is infinite, as that of a single prompt, is null."""
    return {name: value if isfinite(value) else None for name, value in asdict(e).items()}


def image_rows(now: Evaluated) -> list[dict[str, Any]]:
    """Each picture with its scores."""
    return [
        {**asdict(image), "scores": {name: scores[i] for name, scores in now.scores.items()}}
        for i, image in enumerate(now.images)
    ]
