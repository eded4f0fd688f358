"""`difftune eval`: pictures of a list of prompts, or of a folder, scored by rewards and compared with an earlier run.

Killed at any time, an evaluation with an output folder goes on from there: pictures that were drawn and scores that
were given are kept, so that a further reward costs no picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from difftune.configs.images import EvalConfig
from difftune.errors import UserError
from difftune.evaluation import report, shapeeval
from difftune.evaluation.drawn import (
    BATCHES,
    PICTURES,
    Drawing,
    EvalImage,
    cost_of,
    draw_missing,
    drawing_settings,
    images_in,
)
from difftune.evaluation.intervals import Result
from difftune.evaluation.judged import SCORES, Kept, Pictures, score_pictures
from difftune.evaluation.prompt_lists import read_entries
from difftune.evaluation.results import Evaluated, image_rows, read_evaluated, summarise
from difftune.evaluation.trained import rewards_of_model, rewards_of_pictures
from difftune.files import output
from difftune.files.claim import Claim, claimed
from difftune.files.versions import versions
from difftune.lookup import guidance_named, reward_weights
from difftune.pipelines.fingerprint import differ
from difftune.pipelines.generate import method_settings
from difftune.pipelines.shared import entered_by_main, made_by_main
from difftune.processes import say_once
from guidance.contract import Guidance
from rewards import hub
from rewards.registry import entry
from rewards.world import grammar

RESULT, REPORT, GRID = "eval.json", "report.html", "grid.png"
MOST_IN_GRID = 180  # pictures, as many as ShapeEval has prompts


class Asked(NamedTuple):
    """What the settings name, as objects: all that can be wrong was found."""

    method: Guidance
    rewards: list[str]
    images: list[EvalImage]
    then: Evaluated | None
    by_default: bool  # no reward was named: the oracle judges, and the results are ShapeEval's too


def run_eval(config: EvalConfig) -> dict[str, Any]:
    """Evaluate; with an output folder, write eval.json, report.html, grid.png and the pictures. Returns what eval.json
    holds.

    The processes that were launched together divide the drawing; the main one judges, and writes. Raises UserError,
    before anything is loaded, for what cannot be evaluated: an unknown reward, a prompt that it cannot judge, a
    baseline that was not scored by it.
    """
    asked, began = ask(config), perf_counter()
    with entered_by_main(evaluation_folder(config)) as opened:
        own, claim = opened or (None, None)
        folder = made_by_main(lambda: own)
        assert folder is not None
        drawn = provide(config, asked, folder)
        return made_by_main(lambda: judge_drawn(config, asked, folder, drawn, claim, began))


def judge_drawn(
    config: EvalConfig,
    asked: Asked,
    folder: Path,
    drawn: tuple[Path, str | None, dict[str, Any]],
    claim: Claim | None,
    began: float,
) -> dict[str, Any]:
    """The results of the pictures, their model's digest and their cost, written if the folder is claimed."""
    pictures, digest, cost = drawn
    files, kept = Pictures.of(pictures, asked.images), Kept.of(folder / SCORES)
    scores = {name: score_pictures(files, name, config.batch_size, kept) for name in asked.rewards}
    now = Evaluated(asked.images, scores, pictures, trained_on(config))
    found = {
        **results_of(asked, now),
        **cost,
        "seconds": round(perf_counter() - began, 3),
        "trained_on": None if now.trained is None else sorted(now.trained),
        "pictures": str(pictures.resolve()) if claim is not None or config.images else None,
        "settings": settings_of(config, asked, digest),
        "versions": versions(),
        "images": [row | holds_of(asked, row) for row in image_rows(now)],
    }
    say_if_other(config, digest)
    if claim is not None:
        claim.results(eval_files(found, now, asked.then))
    return found


def ask(config: EvalConfig) -> Asked:
    """Everything that the settings name. UserError for what cannot be done."""
    if (config.model is None) == (config.images is None):
        raise UserError("give --model to draw with, or --images, a folder of pictures that are there: one of them")
    if config.resume_from_checkpoint and config.output_dir is None:
        raise UserError("an evaluation is resumed in its folder: give the --output_dir that it has")
    weights = reward_weights(config.reward)
    if weighed := [name for name, weight in weights.items() if weight != 1]:
        raise UserError(f"each reward is reported by itself: leave the weight of {weighed[0]!r} out")
    rewards = list(weights) or ["oracle"]
    for name in rewards:
        hub.prefetch(name)  # what is missing is found before hours of drawing
    method = guidance_named(config.guidance, None, config.guidance_options)
    entries = read_entries(config.prompts, config.prompts_per_category)
    needing = [name for name in rewards if entry(name).needs_prompt]
    if config.images is None:
        texts, seeds = shapeeval.plan(entries, config.images_per_prompt, config.seed)
        kinds = {e["prompt"]: e["category"] for e in entries}
        named = enumerate(zip(texts, seeds, strict=True))
        images = [EvalImage(f"{i:05d}-seed{seed}.png", text, kinds[text], seed) for i, (text, seed) in named]
    else:
        images = images_in(config.images, needing, {e["prompt"]: e["category"] for e in entries})
    if "oracle" in rewards:
        check_captions(images, config.images or config.prompts, not config.reward)
    return Asked(method, rewards, images, baseline_of(config, rewards), not config.reward)


def check_captions(images: Sequence[EvalImage], where: str, by_default: bool) -> None:
    """UserError for a caption that the oracle cannot judge."""
    try:
        for prompt in dict.fromkeys(image.prompt for image in images):
            grammar.parse(prompt)
    except ValueError as error:
        other = "; give --reward, for another judge" if by_default else ""
        raise UserError(f"the oracle cannot judge {where}: {error}{other}") from error


def baseline_of(config: EvalConfig, rewards: Sequence[str]) -> Evaluated | None:
    """The earlier evaluation. UserError if a reward did not score it."""
    if config.baseline is None:
        return None
    then = read_evaluated(config.baseline)
    if missing := [name for name in rewards if name not in then.scores]:
        raise UserError(
            f"--baseline {config.baseline} has no scores of {missing[0]!r}, but of {', '.join(then.scores) or 'none'}: "
            f"evaluate it with --reward {missing[0]}"
        )
    return then


# ------------------------------------------------------------------------------------------------ the folder


@contextmanager
def evaluation_folder(config: EvalConfig) -> Iterator[tuple[Path, Claim | None]]:
    """The folder that the pictures and the scores are kept in: the output folder, which is claimed, or one for now.

    UserError for a folder that holds anything, unless it is an evaluation and is resumed.
    """
    if config.output_dir is None:
        with TemporaryDirectory(prefix="difftune-eval-") as folder:
            yield Path(folder), None
        return
    with claimed(config.output_dir) as claim:
        if not config.resume_from_checkpoint:
            claim.clear()
        held = claim.held()
        if held and not {PICTURES, SCORES} & set(held):
            raise UserError(
                f"{claim.path} holds another run ({held[0]}): nothing was written, choose another --output_dir"
            )
        if held and not config.resume_from_checkpoint:
            raise UserError(
                f"{claim.path} holds an evaluation ({held[0]}): go on with it by --resume_from_checkpoint latest, or "
                "choose another --output_dir"
            )
        try:
            yield claim.path, claim
        except BaseException:
            if not {BATCHES, SCORES} & set(claim.held()):
                output.remove(claim.path / PICTURES)  # the plan alone is nothing to go on from
            raise


def provide(config: EvalConfig, asked: Asked, folder: Path) -> tuple[Path, str | None, dict[str, Any]]:
    """The folder of the pictures, which are drawn if they are not there, the digest of the model, and the cost."""
    if config.images is not None:
        return Path(config.images), None, {}
    drawing = Drawing(folder, drawing_settings(config, method_settings(asked.method)), asked.images)
    digest = draw_missing(config, asked.method, drawing)
    return drawing.pictures, digest, cost_of(drawing)


def trained_on(config: EvalConfig) -> frozenset[str] | None:
    """The rewards that the model was trained on; None if it is not known."""
    if config.images is not None:
        return rewards_of_pictures(Path(config.images))
    return rewards_of_model(config.model, config.lora)


def say_if_other(config: EvalConfig, now: str | None) -> None:
    """Say that the baseline is another model's."""
    then = None if config.baseline is None else shapeeval.digest_in(config.baseline)
    if differ(then, now):
        say_once(
            f"--baseline {config.baseline} was made with model digest {then}, but {config.model!r} has {now}: the two "
            "are different models"
        )


# ------------------------------------------------------------------------------------------------ what is written


def results_of(asked: Asked, now: Evaluated) -> dict[str, Any]:
    """The scores, and the changes if there is a baseline; of the oracle by default, those of ShapeEval come first."""
    then = asked.then
    found = summarise(now, then)
    if not asked.by_default:
        return found
    verdicts = shapeeval.summary(verdicts_in(now), None if then is None else verdicts_in(then))
    del verdicts["images"]
    return verdicts | found


def verdicts_in(found: Evaluated) -> list[Result]:
    """The oracle's word on each picture."""
    rows = zip(found.images, found.scores["oracle"], strict=True)
    return [Result(image.prompt, image.category, image.seed, bool(score)) for image, score in rows]


def holds_of(asked: Asked, row: Mapping[str, Any]) -> dict[str, bool]:
    return {"holds": bool(row["scores"]["oracle"])} if asked.by_default else {}


def settings_of(config: EvalConfig, asked: Asked, digest: str | None) -> dict[str, Any]:
    """The settings, with what was resolved."""
    settings = {name: value for name, value in config.written().items() if name != "resume_from_checkpoint"}
    return settings | {
        "reward": asked.rewards,
        "guidance_options": method_settings(asked.method),
        "model_digest": digest,
    }


def eval_files(found: Mapping[str, Any], now: Evaluated, then: Evaluated | None) -> Iterator[tuple[str, bytes | str]]:
    """Names and contents of the results."""
    assert now.pictures is not None
    first = list({image.prompt: now.pictures / image.file for image in reversed(now.images)}.values())[::-1]
    chosen = np.linspace(0, len(first) - 1, min(len(first), MOST_IN_GRID)).round().astype(int)
    yield GRID, output.grid(report.of_one_size([report.thumbnail(first[i]) for i in chosen]))
    yield REPORT, report.eval_page(found, now, then)
    yield RESULT, output.as_json(found)
