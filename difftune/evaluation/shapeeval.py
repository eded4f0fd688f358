"""ShapeEval: how often the oracle finds that pictures show what their captions say, with honest intervals.

Images of one prompt are correlated, so the prompt is the unit of every interval here: a score is the mean over prompts
of the share of their images that hold, and it is the prompts that are resampled.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from difftune.environment import versions
from difftune.errors import UserError
from difftune.files import output
from difftune.lookup import guidance_named
from difftune.pipelines.generate import generate, mean_branches, mean_nfe, opened, pixels, settings_of, watched
from guidance.contract import Guidance
from rewards.world import shapes
from rewards.world.oracle import Oracle

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    score: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference counts."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.score:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Result:
    """The oracle's word on one image."""

    prompt: str
    category: str
    seed: int
    holds: bool


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927): never empty, also at 0 and 1."""
    p, z2 = successes / trials, Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def estimate(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """The mean of independent `values` in `bounds`, with a percentile bootstrap interval.

    Each resample draws n - 1 of the n values, which makes the bootstrap's variance the unbiased one (Rao & Wu 1988).
    Where all values agree a bootstrap has no width: then see `_unanimous`.
    """
    x = np.asarray(values, np.float64)
    if len(x) == 0:
        raise ValueError("an interval needs at least one prompt")
    if np.ptp(x) == 0:
        return _unanimous(float(x[0]), len(x), bounds)
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(len(x), size=(RESAMPLES, len(x) - 1))
    low, high = np.quantile(x[draws].mean(1), (0.025, 0.975))
    return Estimate(float(x.mean()), float(low), float(high))


def _unanimous(value: float, n: int, bounds: tuple[float, float]) -> Estimate:
    """n values that agree: of all others at most a share w differs, Wilson's bound for 0 of n, and may lie at a bound.

    At a score of 0 or 1 this is Wilson's interval itself.
    """
    w = wilson(0, n)[1]
    return Estimate(value, value - (value - bounds[0]) * w, value + (bounds[1] - value) * w)


def scores(results: Sequence[Result]) -> dict[str, Estimate]:
    """{"overall": ..., category: ...} of the categories that occur."""
    return {name: estimate(_by_prompt(group)) for name, group in _groups(results)}


def differences(results: Sequence[Result], baseline: Sequence[Result]) -> dict[str, Estimate]:
    """This minus the baseline, paired: over the (prompt, seed) that both have."""
    before = {(r.prompt, r.seed): r.holds for r in baseline}
    paired = [r for r in results if (r.prompt, r.seed) in before]
    if not paired:
        raise UserError("the baseline shares no prompt and seed with this run: evaluate both with the same --seed")
    return {name: estimate(_by_prompt(group, before), bounds=(-1.0, 1.0)) for name, group in _groups(paired)}


def _groups(results: Sequence[Result]) -> Iterable[tuple[str, list[Result]]]:
    yield "overall", list(results)
    for name in shapes.CATEGORIES:
        if group := [r for r in results if r.category == name]:
            yield name, group


def _by_prompt(results: Sequence[Result], before: Mapping[tuple[str, int], bool] | None = None) -> list[float]:
    """Per prompt, the mean over its images of `holds`, less what held before."""
    values: dict[str, list[float]] = {}
    for r in results:
        values.setdefault(r.prompt, []).append(float(r.holds) - (float(before[r.prompt, r.seed]) if before else 0.0))
    return [float(np.mean(v)) for v in values.values()]


# ------------------------------------------------------------------------------------------------ prompts and pictures


def entries_of(per_category: int | None = None) -> list[dict[str, str]]:
    """ShapeEval's prompts, or the first `per_category` of each category."""
    chosen: list[dict[str, str]] = []
    for name in shapes.CATEGORIES:
        chosen += [entry for entry in shapes.shapeeval() if entry["category"] == name][:per_category]
    return chosen


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's image, which depends neither on the batch nor on which other prompts are evaluated."""
    digest = hashlib.sha256(f"{seed}/{index}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def plan(entries: Sequence[Mapping[str, str]], images_per_prompt: int, seed: int) -> tuple[list[str], list[int]]:
    """The prompt and the seed of every image."""
    jobs = [(e["prompt"], image_seed(seed, e["prompt"], i)) for e in entries for i in range(images_per_prompt)]
    return [prompt for prompt, _ in jobs], [s for _, s in jobs]


def judged(images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> list[Result]:
    """The oracle's word on images (B, 3, H, W) in [0, 1]."""
    kinds = [shapes.category(shapes.parse(prompt)) for prompt in prompts]
    holds = Oracle()(images, prompts).bool().tolist()
    return [Result(*found) for found in zip(prompts, kinds, seeds, holds, strict=True)]


class Evaluation(NamedTuple):
    """The oracle's word on every image, and what it cost."""

    results: list[Result]
    images: Tensor  # (N, 3, H, W) in [0, 1]
    nfe: float  # rows that went through the network, per image
    branches: dict[str, float]  # of them, those of each branch ("cond", "uncond", ...)
    seconds: float


def evaluate(
    pipe: Any,
    guidance: Guidance,
    entries: Sequence[Mapping[str, str]],
    images_per_prompt: int = 4,
    steps: int = 25,
    seed: int = 0,
    batch_size: int = 16,
) -> Evaluation:
    """Images of the prompts of `entries` under `guidance`, judged."""
    began = time.perf_counter()
    texts, seeds = plan(entries, images_per_prompt, seed)
    made = generate(pipe, texts, seeds, guidance, steps, batch_size)
    batches = list(watched(made, len(texts), "eval"))
    images = torch.cat([batch.images for batch in batches])
    cost = mean_nfe(batches), mean_branches(batches), time.perf_counter() - began
    return Evaluation(judged(images, texts, seeds), images, *cost)


# ------------------------------------------------------------------------------------------------ as JSON


def summary(results: Sequence[Result], baseline: Sequence[Result] | None = None) -> dict[str, Any]:
    """The scores, the paired differences where there is a baseline, and the result of every image."""
    found: dict[str, Any] = {name: asdict(e) for name, e in scores(results).items()}
    if baseline is not None:
        changes = differences(results, baseline)
        found["difference"] = {name: asdict(e) | {"counts": e.excludes_zero} for name, e in changes.items()}
    return found | {"images": [asdict(r) for r in results]}


def load_results(path: str | Path) -> list[Result]:
    """The images of an earlier evaluation, from what `difftune eval --json` printed or `eval.json`."""
    try:
        images = json.loads(Path(path).read_text())["images"]
        return [Result(i["prompt"], i["category"], int(i["seed"]), bool(i["holds"])) for i in images]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no evaluation ({error}): give the file that `difftune eval --json` printed"
        ) from error


def run(
    model: str,
    guidance: str = "cfg",
    guidance_options: Mapping[str, Any] | None = None,
    num_inference_steps: int = 25,
    images_per_prompt: int = 4,
    prompts_per_category: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    lora: str | Sequence[str] | None = None,
    baseline: str | None = None,
    output_dir: str | None = None,
) -> dict[str, Any]:
    """`difftune eval`: ShapeEval of a model as one JSON object; written to output_dir/eval.json too, beside a grid."""
    before = None if baseline is None else load_results(baseline)
    folder = None if output_dir is None else output.unused(output_dir)
    method = guidance_named(guidance, None, guidance_options)
    chosen = entries_of(prompts_per_category)
    e = evaluate(opened(model, lora), method, chosen, images_per_prompt, num_inference_steps, seed, batch_size)
    settings = {
        "model": model,
        "lora": lora or None,
        "guidance": guidance,
        "guidance_options": settings_of(method),
        "num_inference_steps": num_inference_steps,
        "images_per_prompt": images_per_prompt,
        "prompts_per_category": prompts_per_category,
        "seed": seed,
        "batch_size": batch_size,
        "baseline": baseline,
    }
    cost = {"nfe": e.nfe, "nfe_by_branch": e.branches, "seconds": round(e.seconds, 3)}
    cost |= {"settings": settings, "versions": versions()}
    found = summary(e.results, before)
    found = {key: value for key, value in found.items() if key != "images"} | cost | {"images": found["images"]}
    if folder is not None:
        output.write(folder / "grid.png", output.grid(pixels(e.images[::images_per_prompt])))
        output.write_json(folder / "eval.json", found)
    return found
