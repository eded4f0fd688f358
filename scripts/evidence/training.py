"""Recipes on the embedded models, at most eight minutes each, and AlignProp against DDPO.

What follows a gradient gets the smoothed `tiny-clip`, with the oracle held out. What only calls its reward gets the
oracle itself, on training captions: then the reward of held-out prompts is the oracle's, and other judges stand beside.
"""

import itertools
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import bench_recipes
import numpy as np
from bench_recipes import THRICE, Job
from benching import Store, table

from difftune.evaluation.intervals import Estimate, estimate
from difftune.recipes import RECIPES
from evidence.noise import SMOOTH
from evidence.rows import Claim, Results, Row, Section, above, paired, said

GRADIENT = ("alignprop", "drtune", "adjoint-matching")
CALLED = ("ddpo", "d3po", "pso", "dragon", "grpo", "nft")
ENDLESS = ("grpo", "nft")  # trained until the cap; the others, for as many updates as their example has
MODELS = ("tiny", "tiny-turbo", "tiny-flow", "tiny-clip", "tiny-classifier")
PAPERS = {
    "alignprop": "higher reward than DDPO, which is told of prompts that were not trained on too",
    "drtune": "early steps learn too: higher reward than AlignProp and ReFL",
    "adjoint-matching": "the tilted distribution, with diversity kept",
    "ddpo": "any reward can be raised, without a gradient",
    "d3po": "as DDPO, from preferences alone",
    "pso": "few-step models are tuned without losing their steps",
    "dragon": "sets of images are raised in any reward",
    "grpo": "GenEval .63 to .95 (SD 3.5 Medium)",
    "nft": "GenEval .24 to .98 (SD 3.5 Medium, without CFG)",
}
CURVES: dict[str, tuple[str, ...]] = {  # on one flow without guidance: the flags of each, beside its example
    "nft": ("--kl_weight", "0", "--ema_decay", "0.99"),
    "grpo": ("--ema_decay", "0.99"),
    "alignprop": (),
    "adjoint-matching": (),
    "ddpo": ("--eta", "0.3", "--ema_decay", "0.99"),  # all steps add noise: the first would spoil pictures at .7
    "d3po": ("--eta", "0.3", "--ema_decay", "0.99"),
}
STEPS, BESIDE = 10, 2.0  # of the sampler where a curve is measured, and CFG's scale in the other evaluation of its end
RISE = 0.1  # of ShapeEval, whose cost is told
RULES = {  # of which sampler steps carry gradient, and of how an update counts; the first is the default
    "K from 1 to 10": (),
    "K from 5 to 10": ("--truncation_min", "5"),
    "K from 1 to 10, normalised": ("--normalize_gradient",),
}


class Size(NamedTuple):
    """How much is trained and judged."""

    cap: float = 480  # seconds
    seeds: tuple[int, ...] = (0, 1, 2)  # of THRICE; the others have the first
    recipes: tuple[str, ...] = (*GRADIENT, *CALLED)
    per_category: int = 10  # held-out prompts
    images: int = 4
    flags: tuple[str, ...] = ()
    duel: tuple[float, float] = (180, 3600)  # seconds of alignprop, and at most of ddpo
    chosen_on: tuple[int, ...] = (10, 11)  # seeds of the choice of a rule, on which nothing else is reported
    forwards: float = 13_000  # forward-equivalents of each run in that choice
    curve: tuple[float, int] = (1200, 6)  # seconds of each, and the checkpoints that are measured


QUICK = Size(900, (0,), (*GRADIENT, *CALLED), 1, 2, bench_recipes.QUICK, (900, 900), (10,), 400, (900, 1))


def flags_of(recipe: str, size: Size) -> tuple[str, ...]:
    own = endless(size) if recipe in ENDLESS else size.flags
    return ("--reward", reward_of(recipe), *own)


def reward_of(recipe: str) -> str:
    return SMOOTH if recipe in GRADIENT else "oracle"


def endless(size: Size) -> tuple[str, ...]:
    """The flags of a run that is stopped by its time or by its forwards; but a quick one has its two steps."""
    return (*(size.flags or ("--max_train_steps", "1000000")), "--checkpointing_steps", "5")


def seeds_of(recipe: str, size: Size) -> tuple[int, ...]:
    return size.seeds if recipe in THRICE else size.seeds[:1]


def row_of(recipe: str, seed: int, size: Size, results: Results) -> Row:
    name, flags = f"training/{recipe}-{seed}", flags_of(recipe, size)
    settings = {"recipe": recipe, "seed": seed, "flags": flags, "cap": size.cap, "judged": judged_by(size)}
    sizes = {"per_category": size.per_category, "images": size.images}
    job = Job(recipe, seed, results.folder / f"{name}-run", flags, size.cap, **sizes)
    return Row(name, settings, MODELS, partial(trained, job))


def judged_by(size: Size) -> list[Any]:
    return [size.per_category, size.images, bench_recipes.EVAL_SEED, bench_recipes.JUDGES]


def trained(job: Job) -> dict[str, Any]:
    """A run of `bench_recipes.py`, judged; its folder is removed, as it may take much room."""
    results = job.folder.with_suffix(".jsonl")
    results.unlink(missing_ok=True)
    bench_recipes.follow(job, results)
    line = Store(results).read().get(job.folder.name)
    if line is None:
        raise SystemExit(f"{job.folder.name} failed: see what it printed above")
    shutil.rmtree(job.folder)
    results.unlink()
    return line


def duel_rows(size: Size, results: Results) -> list[Row]:
    """AlignProp, and DDPO with ten times its forward-equivalents, on one reward."""
    settings = {"duel": size.duel, "reward": SMOOTH, "judged": judged_by(size), "flags": size.flags}
    return [
        Row(f"training/duel-{name}", settings | {"recipe": name}, MODELS, partial(duel, name, size, results), "duel")
        for name in ("alignprop", "ddpo")
    ]


def duel(name: str, size: Size, results: Results) -> dict[str, Any]:
    rows = dict(zip(("alignprop", "ddpo"), duel_rows(size, results), strict=True))
    flags = ("--reward", SMOOTH, "--guidance", "none", *endless(size))
    sizes: dict[str, Any] = {"points": bench_recipes.POINTS, "per_category": size.per_category, "images": size.images}
    limit = float("inf")
    if name == "ddpo":
        limit = 10 * results.measured(rows["alignprop"])["points"][-1]["forward_equivalents"]
    cap = size.duel[name == "ddpo"]
    job = Job(name, 0, results.folder / f"training/duel-{name}-run", flags, cap, limit, **sizes)
    return trained(job)


def rule_row(rule: str, seed: int, size: Size, results: Results) -> Row:
    """AlignProp under a rule, for as many forward-equivalents as under every other."""
    name = f"training/rule-{list(RULES).index(rule)}-{seed}"
    flags = ("--reward", SMOOTH, *RULES[rule], *endless(size))
    settings = {"rule": rule, "flags": flags, "forwards": size.forwards, "seed": seed, "judged": judged_by(size)}
    sizes = {"per_category": size.per_category, "images": size.images}
    job = Job("alignprop", seed, results.folder / f"{name}-run", flags, 3600, size.forwards, **sizes)
    return Row(name, settings, MODELS, partial(trained, job))


def rule_rows(size: Size, results: Results) -> dict[str, list[Row]]:
    return {rule: [rule_row(rule, seed, size, results) for seed in size.chosen_on] for rule in RULES}


def curve_row(recipe: str, seed: int, size: Size, results: Results) -> Row:
    """A recipe on `tiny-flow` without guidance until the cap, measured on its way, and at its end under CFG too."""
    name, (cap, points) = f"training/curve-{recipe}-{seed}", size.curve
    flags = ("--model", "tiny-flow", "--guidance", "none", "--reward", reward_of(recipe), *CURVES[recipe])
    flags += endless(size)
    sizes: dict[str, Any] = {"per_category": size.per_category, "images": size.images, "points": points}
    sizes |= {"steps": STEPS, "beside": BESIDE}
    settings = {"recipe": recipe, "seed": seed, "flags": flags, "cap": cap, **sizes, "judged": judged_by(size)}
    job = Job(recipe, seed, results.folder / f"{name}-run", flags, cap, **sizes)
    return Row(name, settings, MODELS, partial(trained, job))


def curve_rows(size: Size, results: Results) -> dict[str, list[Row]]:
    """The recipe's rows, a seed each."""
    return {r: [curve_row(r, seed, size, results) for seed in size.seeds] for r in CURVES if r in size.recipes}


def rows(size: Size, results: Results) -> list[Row]:
    """Seed after seed, so that a part of them is already a result."""
    pairs = [(r, s) for s in size.seeds for r in size.recipes if s in seeds_of(r, size)]
    runs = [row_of(recipe, seed, size, results) for recipe, seed in pairs]
    curves, rules = curve_rows(size, results).values(), rule_rows(size, results).values()
    whole = itertools.chain.from_iterable
    return [*runs, *whole(zip(*curves, strict=True)), *duel_rows(size, results), *whole(rules)]


# ------------------------------------------------------------------------------------------------ what is said


def section(size: Size, results: Results) -> Section:
    known = {r: results.all_of(row_of(r, s, size, results) for s in seeds_of(r, size)) for r in size.recipes}
    found = {recipe: lines for recipe, lines in known.items() if lines is not None}
    claims = [claim_of(recipe, lines) for recipe, lines in found.items()]
    texts = [recipes_text(size, found)] if found else []
    lines = results.all_of(duel_rows(size, results))
    if lines is not None:
        duellists = dict(zip(("alignprop", "ddpo"), lines, strict=True))
        claims.append(duel_claim(duellists, found.get("alignprop")))
        texts.append(duel_text(size, duellists))
    curves = {recipe: own for recipe, of in curve_rows(size, results).items() if (own := measured_of(of, results))}
    claims += [curve_claim(recipe, own) for recipe, own in curves.items()]
    texts += [curves_text(size, curves)] if curves else []
    rules = {rule: own for rule, of in rule_rows(size, results).items() if (own := results.all_of(of))}
    texts += [rules_text(size, rules)] if rules else []
    return Section("Fine-tuning", rows(size, results), claims, "\n\n".join(texts))


def measured_of(rows: Sequence[Row], results: Results) -> list[dict[str, Any]]:
    """What those rows found that were measured."""
    return [found for row in rows if (found := results.read(row)) is not None]


def changes(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each judge's difference of each prompt, mean over seeds."""
    last = [line["points"][-1] for line in lines]
    return {
        judge: np.mean([np.subtract(p[f"{judge}_after"], p[f"{judge}_before"]) for p in last], axis=0).tolist()
        for judge in bench_recipes.JUDGES
    }


def claim_of(recipe: str, lines: Sequence[Mapping[str, Any]]) -> Claim:
    """Whether the oracle of held-out prompts rises; it is the trained reward of those that are given it."""
    found = changes(lines)
    oracle, reward = (estimate(found[judge], (-1.0, 1.0)) for judge in ("oracle", "reward"))
    minutes = max(line["points"][-1]["seconds"] for line in lines) / 60
    ours = f"oracle, {'held out' if recipe in GRADIENT else 'in-reward, held-out prompts'}: {said(oracle)}"
    if recipe in GRADIENT:
        ours += f"; its reward {said(reward)}"
    ours += f"; {minutes:.0f} minutes, {len(lines)} seed{'s' * (len(lines) > 1)}"
    title, page = RECIPES[recipe].title, f"recipes/{recipe}.md"
    return Claim(title, page, PAPERS[recipe], ours, above(oracle), f"difftune train {recipe}")


def recipes_text(size: Size, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lead = (
        f"`difftune train RECIPE --config tiny-RECIPE`, at most {size.cap:g} s on one thread; before and after, the "
        f"same noises of {6 * size.per_category} held-out prompts of ShapeEval, {size.images} images each. "
        f"{', '.join(GRADIENT)} follow `{SMOOTH}`, and the oracle is held out; the others are given the oracle itself, "
        "on training captions, so that it is in-reward. The other judges are trained on by none: Vendi, how different "
        "a prompt's pictures are; `coverage`, whether a picture is a scene; `tiny-classifier`, prompts of one object."
    )
    return f"{lead}\n\n{bench_recipes.table([line for lines in found.values() for line in lines])}"


def rise(points: Sequence[Mapping[str, Any]]) -> Estimate:
    """ShapeEval of held-out prompts, to the start: mean over seeds, its interval over prompts."""
    found = [np.subtract(point["oracle_after"], point["oracle_before"]) for point in points]
    return estimate(np.mean(found, axis=0).tolist(), (-1.0, 1.0))


def stages(lines: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The first measured checkpoint of each seed, the second, and so on."""
    return [list(points) for points in zip(*(line["points"] for line in lines), strict=False)]


def cost_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Updates, forward-equivalents and seconds of a stage, mean over seeds."""
    return [f"{np.mean([point[name] for point in points]):.0f}" for name in ("step", "forward_equivalents", "seconds")]


def first_rise(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cost of the first stage at which ShapeEval is RISE higher."""
    costs = (cost_of(points) for points in stages(lines) if rise(points).score >= RISE)
    return next(costs, ["not reached"] * 3)[1:]


def curve_claim(recipe: str, lines: Sequence[Mapping[str, Any]]) -> Claim:
    """Whether ShapeEval of held-out prompts rises on the flow."""
    found, minutes = rise(stages(lines)[-1]), max(line["points"][-1]["seconds"] for line in lines) / 60
    kind = "held out" if recipe in GRADIENT else "in-reward, held-out prompts"
    ours = (
        f"oracle, {kind}: {said(found)}; {minutes:.0f} minutes of one core, {len(lines)} seed{'s' * (len(lines) > 1)}"
    )
    title, page = f"{RECIPES[recipe].title} on a flow", f"recipes/{recipe}.md"
    command = f"difftune train {recipe} --model tiny-flow"
    return Claim(title, page, PAPERS[recipe], ours, above(found), command)


def curves_text(size: Size, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The way of each recipe, and its end by all judges."""
    gradient = ", ".join(recipe for recipe in curves if recipe in GRADIENT)
    followers = f"{gradient} follow `{SMOOTH}`; the others are" if gradient else "They are"
    lead = (
        f"The same flow, `tiny-flow`, without guidance, at most {size.curve[0]:g} s of one thread each. "
        f"{followers} given the oracle itself, "
        f"on training captions, so that it is in-reward. Measured on {6 * size.per_category} held-out prompts, "
        f"{size.images} images each, {STEPS} steps:"
    )
    way = [
        [recipe, *cost_of(points), f"{np.mean([p['oracle_after'] for p in points]):.3f}", said(rise(points))]
        for recipe, lines in curves.items()
        for points in stages(lines)
    ]
    head = ["recipe", "updates", "forward-equivalents", "seconds", "ShapeEval", "to the start"]
    return f"{lead}\n\n{table(head, way)}\n\nWhere each ended:\n\n{ends_table(curves)}"


def ends_table(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The last stage by all judges, without guidance and under CFG, and what a rise of RISE cost."""
    rows = []
    for recipe, lines in curves.items():
        found = changes(lines)
        judges = [said(estimate(found[judge], (-1.0, 1.0))) for judge in ("coverage", "vendi", "classifier")]
        seeds = ", ".join(str(line["seed"]) for line in lines)
        beside = said(rise([line["beside"] for line in lines]))
        rows.append([recipe, seeds, said(rise(stages(lines)[-1])), beside, *judges, *first_rise(lines)])
    head = ["recipe", "seeds", "ShapeEval", f"under CFG {BESIDE:g}", "coverage", "Vendi", "tiny-classifier"]
    head += [f"forward-equivalents to +{RISE:.2f}", f"seconds to +{RISE:.2f}"]
    return table(head, rows)


def reached(lines: Mapping[str, Mapping[str, Any]]) -> tuple[float, float | None, float]:
    """DDPO's best held-out reward, AlignProp's forward-equivalents there (None: not reached), and DDPO's."""
    points = lines["ddpo"]["points"]
    means = [float(np.mean(p["reward_after"])) for p in points]
    level = max(means)
    cost = points[means.index(level)]["forward_equivalents"]
    hits = [p["forward_equivalents"] for p in lines["alignprop"]["points"] if np.mean(p["reward_after"]) >= level]
    return level, min(hits, default=None), cost


def duel_claim(lines: Mapping[str, Mapping[str, Any]], alone: Sequence[Mapping[str, Any]] | None) -> Claim:
    """How many times fewer evaluations, with the oracle of AlignProp's own runs where there are any."""
    level, fast, slow = reached(lines)
    before = float(np.mean(lines["ddpo"]["points"][0]["reward_before"]))
    most = max(float(np.mean(p["reward_after"])) for p in lines["alignprop"]["points"])
    times = "never reaches it" if fast is None else f"{slow / fast:.0f} times fewer evaluations to it"
    ours = f"DDPO's best: {level - before:+.3f} of held-out reward; AlignProp has {most - before:+.3f}, and {times}"
    if alone is not None:
        ours += f"; oracle, held out: {said(estimate(changes(alone)['oracle'], (-1.0, 1.0)))}"
    page, command = "recipes/alignprop.md", "difftune train alignprop"
    return Claim("AlignProp against DDPO", page, "25 times faster than DDPO", ours, fast is not None, command)


def duel_text(size: Size, lines: Mapping[str, Mapping[str, Any]]) -> str:
    lead = (
        f"AlignProp for {size.duel[0]:g} s, and DDPO for ten times its forward-equivalents, both without guidance on "
        f"`{SMOOTH}`, seed 0, one thread:"
    )
    return f"{lead}\n\n{bench_recipes.duel(lines)}"


def rules_text(size: Size, rules: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The rules of truncation, each beside the default, paired."""
    first, lines = next(iter(RULES)), []
    for rule, found in rules.items():
        mine, cells = changes(found), []
        for judge in ("reward", "oracle"):
            own = estimate(mine[judge], (-1.0, 1.0))
            base = changes(rules[first])[judge] if first in rules and rule != first else None
            cells += [said(own), "" if base is None else said(paired(mine[judge], base, 2.0))]
        updates = np.mean([line["points"][-1]["step"] for line in found])
        lines.append([rule, *cells, f"{updates:.0f}"])
    lead = (
        f"AlignProp's last K steps, on `{SMOOTH}` without guidance, {size.forwards:g} forward-equivalents each, "
        f"seeds {', '.join(map(str, size.chosen_on))}; the first row is the default, and the others are paired with it:"
    )
    head = ["rule", "reward, held out", "to the default", "oracle, held out", "to the default ", "updates"]
    return f"{lead}\n\n{table(head, lines)}"
