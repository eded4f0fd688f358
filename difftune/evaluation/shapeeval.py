"""ShapeEval: how often the oracle finds that pictures show what their captions say, with honest intervals.

Images of one prompt are correlated, so the prompt is the unit of every interval here: a score is the mean over prompts
of the share of their images that match their caption, and it is the prompts that are resampled.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from difftune.errors import UserError
from difftune.evaluation.intervals import Estimate, Result, by_category, by_prompt, differences, estimate
from difftune.evaluation.paired import LEVEL, sign_flip_p
from difftune.evaluation.prompt_lists import read_entries
from difftune.files.text import parse_json, read_text
from difftune.pipelines.generate import Pictures, Sampling, draw_pictures, generate_batches
from guidance.contract import Guidance
from rewards.world import grammar
from rewards.world.oracle import Oracle


def scores(results: Sequence[Result]) -> dict[str, Estimate]:
    """{"overall": ..., category: ...} of the categories that occur."""
    return {name: estimate(by_prompt(group)) for name, group in by_category(results)}


# ------------------------------------------------------------------------------------------------ prompts and pictures


def entries_of(per_category: int | None = None, prompts: str = "shapeeval") -> list[dict[str, str]]:
    """The captions of a list or a file, as `read_entries` has them. UserError for one outside the grammar."""
    chosen = read_entries(prompts, per_category)
    try:
        for entry in chosen:
            grammar.parse(entry["prompt"])
    except ValueError as error:
        raise UserError(f"the oracle cannot judge {prompts}: {error}") from error
    return chosen


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of a prompt's image, which depends neither on the batch nor on which other prompts are evaluated."""
    digest = hashlib.sha256(f"{seed}/{index}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def plan(entries: Sequence[Mapping[str, str]], images_per_prompt: int, seed: int) -> tuple[list[str], list[int]]:
    """The prompt and the seed of every image."""
    jobs = [(e["prompt"], image_seed(seed, e["prompt"], i)) for e in entries for i in range(images_per_prompt)]
    return [prompt for prompt, _ in jobs], [s for _, s in jobs]


def judge_images(images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> list[Result]:
    """The oracle's verdict on images (B, 3, H, W) in [0, 1]."""
    kinds = [grammar.category(grammar.parse(prompt)) for prompt in prompts]
    holds = Oracle()(images, prompts).bool().tolist()
    return [Result(*found) for found in zip(prompts, kinds, seeds, holds, strict=True)]


class Evaluation(NamedTuple):
    """The oracle's verdict on every image."""

    results: list[Result]
    made: Pictures


def evaluate(
    pipe: Any,
    guidance: Guidance,
    entries: Sequence[Mapping[str, str]],
    images_per_prompt: int = 4,
    num_inference_steps: int = 25,
    seed: int = 0,
    batch_size: int = 16,
) -> Evaluation:
    """Images of the prompts of `entries` under `guidance`, judged."""
    texts, seeds = plan(entries, images_per_prompt, seed)
    batches = generate_batches(pipe, texts, seeds, guidance, Sampling(num_inference_steps, batch_size))
    made = draw_pictures(batches, len(texts), "eval")
    return Evaluation(judge_images(made.images, texts, seeds), made)


# ------------------------------------------------------------------------------------------------ as JSON


def summary(results: Sequence[Result], baseline: Sequence[Result] | None = None) -> dict[str, Any]:
    """The scores, the paired differences if there is a baseline, and the result of every image."""
    found: dict[str, Any] = {name: asdict(e) for name, e in scores(results).items()}
    if baseline is not None:
        changes, ps = differences(results, baseline), p_values(results, baseline)
        found["difference"] = {
            name: asdict(e) | {"counts": e.excludes_zero and ps[name] <= LEVEL} for name, e in changes.items()
        }
    return found | {"images": [asdict(r) for r in results]}


def p_values(results: Sequence[Result], baseline: Sequence[Result]) -> dict[str, float]:
    """The p value of each of `differences`, which random signs give; not adjusted for the number of categories."""
    before = {(r.prompt, r.seed): r.holds for r in baseline}
    groups = by_category([r for r in results if (r.prompt, r.seed) in before])
    return {name: sign_flip_p(by_prompt(group, before)) for name, group in groups}


def load_results(path: str | Path) -> list[Result]:
    """The images of an earlier evaluation, from what `difftune eval --json` printed or `eval.json`."""
    try:
        images = parse_json(read_text(path, "--baseline"))["images"]
        return [Result(i["prompt"], i["category"], int(i["seed"]), bool(i["holds"])) for i in images]
    except UserError:
        raise
    except (RecursionError, ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not an evaluation ({why}): give what `difftune eval --json` printed") from error


def digest_in(path: str | Path) -> str | None:
    """The digest of the model that an evaluation file was made with; None if the file has none."""
    settings = parse_json(read_text(path, "--baseline")).get("settings")
    return settings.get("model_digest") if isinstance(settings, dict) else None
