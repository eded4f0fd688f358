"""Guidance methods on `tiny`, or on `tiny-flow`: what they cost, what they reach, where they fail.

    python scripts/bench_guidance.py [overhead sweep hard classes adaptive inversion table] [--quick] [--output_dir DIR]

overhead   attach(pipe, CFG) beside the stock pipeline, and our own loop beside both: seconds per image
sweep      ShapeEval, Fréchet distance, coverage, saturation and diversity over scales, all methods at one number of
           evaluations; on tiny-flow the methods for flows too
hard       the same on ShapeEval-hard
table      what sweep and hard found at these settings, and the paired differences of each score to CFG's: at the same
           scale, at the best scale of both, and at equal strength on a Gaussian (Rectified-CFG++)
classes    the same on the prompts of the classifier's classes, for GFCG
adaptive   adaptive guidance against CFG, paired: score, evaluations, seconds of the denoising loop
inversion  PSNR of rendered pictures after inversion and sampling, CFG against CFG++ at paired scales

Every result is a line of --output_dir/results.jsonl, and one that is there is not measured again, so that a run can go
on; --quick is a smoke test of all parts. All intervals are 95 %, over prompts (over pictures for PSNR).
"""

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
import torch
from benching import Store, hardware, heading, paired, ratios, row, weights
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from difftune.evaluation import intervals, shapeeval
from difftune.evaluation.compare import at_cfg_scale
from difftune.lookup import guidance_named, takes_scale
from difftune.pipelines.generate import Sampling, generate_batches
from difftune.pipelines.method_parts import TEXTS
from difftune.pipelines.opened import open_pipeline
from guidance.attach.handle import attach
from guidance.contract import Guidance
from guidance.guided import guided
from guidance.invert import edit
from guidance.methods.catalogue import CFG, GFCG, AdaptiveGuidance, CFGpp
from rewards.registry import load
from rewards.sets.frechet import frechet
from rewards.sets.vendi import vendi
from rewards.world import draw, grammar
from rewards.world.classifier import load_classifier
from rewards.world.render import render
from solvers.denoiser import Path
from solvers.exact import Mixture
from solvers.latent import LatentModel
from solvers.noise import Noise
from solvers.samplers.catalogue import euler, sample

METHODS = ("none", "cfg", "cfgpp", "apg", "ag", "interval", "autoguidance")
FLOW_METHODS = (
    *("none", "cfg", "cfgpp", "rectified-cfgpp", "apg", "mambo-g", "fbg"),
    *("interval", "ag", "cfg-zero"),
)
NEIGHBOURS = 5  # that a picture's neighbourhood reaches to, in `coverage`
PAIRS = ((0.2, 2.0), (0.4, 5.0), (0.6, 7.5), (0.8, 9.0), (1.0, 12.5))  # CFG++ and CFG scales that are compared
VARIANCE = 0.7  # of the Gaussians on which a method's strength is told
SHRINKAGE = 0.01  # of the covariances: the features are many for the pictures


class Size(NamedTuple):
    """How much is measured."""

    scales: tuple[float, ...] = (1.5, 2.5, 4.0, 6.0, 9.0, 13.0)
    evaluations: int = 50  # an image may cost
    images: int = 4  # of a prompt
    prompts: int | None = None  # of each category; None: all
    steps: int = 25
    repeats: int = 30
    pictures: int = 64  # that are inverted
    inversion_steps: int = 50
    adaptive_images: int = 12  # of a prompt
    batch_size: int = 16  # in which those are made
    resamples: int = 200
    model: str = "tiny"


QUICK = Size((2.0,), 4, 2, 1, 2, 1, 2, 2, 1, 16, 20)


def cell(folder: File, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of that name: read, or measured and written."""
    found = Store(folder / "results.jsonl").measured(name, measure)
    print(name, json.dumps({key: v for key, v in found.items() if not isinstance(v, list)}), flush=True)
    return found


# ------------------------------------------------------------------------------------------------ overhead
@torch.no_grad()
def overhead(size: Size, batch: int) -> dict[str, Any]:
    pipe = _pipe(size)
    prompts, latent = ["a red circle left of a blue square"] * batch, LatentModel(pipe)

    def stock() -> object:
        return pipe(prompts, num_inference_steps=size.steps, guidance_scale=5.0, output_type="pt").images

    def attached() -> object:
        with attach(pipe, CFG(5.0)):
            return stock()

    def own() -> object:
        predict = guided(latent.denoiser, CFG(5.0), latent.encode(prompts))
        *_, path = sample(euler, predict, Path(latent.noise(batch)), latent.levels(size.steps))
        return latent.decode(path.x)

    seconds = paired({"stock": stock, "attached": attached, "own": own}, size.repeats)
    return {
        "batch": batch,
        "pairs": size.repeats,
        "on": hardware(),
        "ms_per_image": {name: 1000 * statistics.median(values) / batch for name, values in seconds.items()},
        "ratio": {name: found._asdict() for name, found in ratios(seconds, "stock").items()},
    }


# ------------------------------------------------------------------------------------------------ sweep
class Set(NamedTuple):
    """Prompts, and the features of a rendered picture for each of their images."""

    entries: list[dict[str, str]]
    features: Tensor  # (prompts, images, D)


def entries_of(name: str, size: Size) -> list[dict[str, str]]:
    """The prompts of a list, of each category as many as the size says; "classes" are those of the classifier."""
    if name == "classes":
        return [{"prompt": text, "category": "one_object"} for text in TEXTS[: size.prompts and 2 * size.prompts]]
    return shapeeval.entries_of(size.prompts, name)


def prompts_of(name: str, size: Size) -> Set:
    entries = entries_of(name, size)
    rng = np.random.default_rng([0, len(entries)])
    captions = [grammar.parse(e["prompt"]) for e in entries for _ in range(size.images)]
    pictures = [torch.from_numpy(render(draw.draw_scene(rng, caption))).permute(2, 0, 1) for caption in captions]
    return Set(entries, features(torch.stack(pictures)).view(len(entries), size.images, -1))


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    classifier = load_classifier()
    return torch.cat([classifier.features(part.float()) for part in images.split(64)])


PILOTS = 24  # pictures that tell what a step costs, where it is not the same for all
VARYING = (AdaptiveGuidance, GFCG)
TRIES = 5  # of a number of steps


def steps_for(pipe: Any, method: Guidance, prompts: Sequence[str], size: Size) -> int:
    """As many steps as come closest to the evaluations that are allowed, by what pilot pictures cost: first at CFG's
    number, and then at those that follow from it, since some steps cost less than others."""
    pilot = pilots_of(method, prompts)

    def cost(steps: int) -> float:
        sampling = Sampling(steps, len(pilot))
        return next(iter(generate_batches(pipe, pilot, range(len(pilot)), method, sampling))).nfe

    return closest(cost, size.evaluations)


def pilots_of(method: Guidance, prompts: Sequence[str]) -> list[str]:
    """One prompt, or for a method whose cost depends on the picture `PILOTS` of them, from all over the list."""
    count = min(PILOTS, len(prompts)) if isinstance(method, VARYING) else 1
    return [prompts[i * len(prompts) // count] for i in range(count)]


def closest(cost: Callable[[int], float], evaluations: int) -> int:
    """The number of steps whose cost comes closest, of those that are tried: each is what the last one's cost tells."""
    tried: dict[int, float] = {}
    steps = max(1, evaluations // 2)
    while steps not in tried and len(tried) < TRIES:
        tried[steps] = cost(steps)
        steps = max(1, round(evaluations * steps / tried[steps]))
    return min(tried, key=lambda steps: abs(tried[steps] - evaluations))


def measured(name: str, scale: float | None, given: Set, size: Size) -> dict[str, Any]:
    """One method at one scale: scores and their intervals."""
    pipe, prompts = _pipe(size), [e["prompt"] for e in given.entries]
    method = guidance_named(name) if scale is None else at_cfg_scale(name, scale, pipe, size.steps)
    steps = steps_for(pipe, method, prompts, size)
    if scale is not None:  # CFG++'s scale depends on the number of steps
        method = at_cfg_scale(name, scale, pipe, steps)
    results, made = shapeeval.evaluate(pipe, method, given.entries, size.images, steps)
    seen = features(made.images).view(given.features.shape)
    saturation = load("saturation")(made.images, [""] * len(made.images)).view(-1, size.images).mean(1).tolist()
    return {
        "guidance": name,
        "scale": scale,
        "steps": steps,
        "nfe": made.nfe,
        "seconds": made.seconds,
        "score": asdict(shapeeval.scores(results)["overall"]),
        "frechet": _distance(seen, given.features, size.resamples),
        "coverage": asdict(intervals.estimate(coverage(seen, given.features))),
        "saturation": asdict(intervals.estimate(saturation)),
        "diversity": asdict(intervals.estimate([float(vendi(f)) for f in seen], (1.0, float(size.images)))),
        "saturations": saturation,  # of each prompt
        "holds": [r.holds for r in results],
    }


def coverage(seen: Tensor, real: Tensor) -> list[float]:
    """The share of each prompt's rendered pictures that have a drawn one in their neighbourhood, which reaches to their
    `NEIGHBOURS`-th rendered neighbour (https://arxiv.org/abs/2002.09797), of features (prompts, images, D)."""
    drawn, rendered = seen.flatten(0, 1), real.flatten(0, 1)
    apart = torch.cdist(rendered, rendered).fill_diagonal_(torch.inf)
    reach = apart.kthvalue(min(NEIGHBOURS, len(rendered) - 1), dim=1).values
    covered = torch.cdist(rendered, drawn).amin(1) <= reach
    return covered.double().view(real.shape[:2]).mean(1).tolist()


def _distance(seen: Tensor, real: Tensor, resamples: int) -> dict[str, float]:
    """The Fréchet distance, and the spread of a bootstrap over prompts around it: a resampled set, which repeats
    itself, is farther away than the set is."""

    def of(index: Any) -> float:
        return float(frechet(seen[index].flatten(0, 1), real[index].flatten(0, 1), SHRINKAGE))

    rng = np.random.default_rng(0)
    draws = [of(rng.integers(len(seen), size=len(seen))) for _ in range(resamples)]
    score, half = of(slice(None)), float(np.quantile(draws, 0.975) - np.quantile(draws, 0.025)) / 2
    return {"score": score, "low": score - half, "high": score + half}


def sweep(folder: File, size: Size, kind: str, methods: Sequence[str]) -> None:
    given = prompts_of(kind, size)
    for name in methods:
        for scale in size.scales if takes_scale(name) else (None,):

            def measure(name: str = name, scale: float | None = scale) -> dict[str, Any]:
                return measured(name, scale, given, size)

            cell(folder, label_of(kind, name, scale, size), measure)


def label_of(kind: str, name: str, scale: float | None, size: Size) -> str:
    """What a sweep's result depends on: the method, evaluations, images of a prompt, the prompts themselves, and the
    model's weights."""
    prompts = "\n".join(entry["prompt"] for entry in entries_of(kind, size))
    digest = hashlib.sha256(prompts.encode()).hexdigest()[:8]
    depends = [f"{size.evaluations}", f"{size.prompts or 'all'}", f"{size.images}", digest, weights(size.model)]
    return "-".join([kind, name, *([] if scale is None else [f"{scale:g}"]), *depends])


KINDS = {"shapeeval": "ShapeEval", "shapeeval-hard": "ShapeEval-hard"}
MEASURES = ("coverage", "saturation", "diversity")  # told of ShapeEval's pictures
Key = tuple[str, float | None]  # method, scale
Cells = dict[Key, dict[str, Any]]


def print_table(folder: File, size: Size) -> None:
    """What the sweeps of that size found, as Markdown, and how each score differs from CFG's: at the same scale, at the
    best scale of both, and at equal strength."""
    found = {kind: cells_of(folder, kind, size) for kind in KINDS}
    print_scores(*found.values())
    print_differences(found)
    print_best(found)
    print_strengths(found, size)


def print_scores(easy: Cells, hard: Cells) -> None:
    print(heading(["method", "scale", "steps", "NFE", *KINDS.values(), *MEASURES]))
    for key, r in easy.items():
        scores = (told(r["score"]), told(hard[key]["score"]) if key in hard else "-")
        print(row([*named(key), r["steps"], f"{r['nfe']:.1f}", *scores, *(told(r[m]) for m in MEASURES)]))


def print_differences(found: Mapping[str, Cells]) -> None:
    easy = next(iter(found.values()))
    print("\nLess CFG's of the same scale, paired:\n")
    print(heading(["method", "scale", *(f"{name} less CFG" for name in KINDS.values())]))
    for name, scale in easy:
        for base in [scale] if scale is not None else [s for n, s in easy if n == "cfg"]:
            if name != "cfg":
                differences = (less(cells, (name, scale), ("cfg", base)) for cells in found.values())
                print(row([*named((name, base)), *differences]))


def print_best(found: Mapping[str, Cells]) -> None:
    print("\nEach method at its best scale, less CFG at its own, paired:\n")
    print(heading(["method", *(column for name in KINDS.values() for column in ("scale", name, f"{name} less CFG"))]))
    for name in dict.fromkeys(name for name, _ in next(iter(found.values()))):
        print(row([name, *(cell for cells in found.values() for cell in at_best(cells, name))]))


def cells_of(folder: File, kind: str, size: Size) -> Cells:
    """The cells of a sweep of that size, in the order of `FLOW_METHODS` and of the scales."""
    rows = [r for r in Store(folder / "results.jsonl").read().items() if "guidance" in r[1]]
    own = [r for key, r in rows if key == label_of(kind, r["guidance"], r["scale"], size)]
    order = [*FLOW_METHODS, *METHODS]
    own.sort(key=lambda r: (order.index(r["guidance"]), r["scale"] or 0))
    return {(r["guidance"], r["scale"]): r for r in own}


def print_strengths(found: Mapping[str, Cells], size: Size) -> None:
    """Rectified-CFG++ beside CFG of the scale that is closest to its strength in its steps on a Gaussian."""
    print("\nRectified-CFG++ beside CFG of the scale closest to its strength on a Gaussian, paired:\n")
    print(heading(["scale", "steps", "strength", "CFG", *(f"{name} less CFG" for name in KINDS.values())]))
    easy = next(iter(found.values()))
    for name, scale in [key for key in easy if key[0] == "rectified-cfgpp" and ("cfg", key[1]) in easy]:
        steps = easy[name, scale]["steps"]
        own = strength(at_cfg_scale(name, scale, None, steps), LatentModel(_pipe(size)).levels(steps))
        base = ("cfg", min((s for n, s in easy if n == "cfg"), key=lambda s: abs(s - own)))
        differences = (less(cells, (name, scale), base) for cells in found.values())
        print(row([f"{scale:g}", steps, f"{own:.2f}", named(base)[1], *differences]))


def strength(method: Guidance, levels: Sequence[Noise]) -> float:
    """Where a run from 0 ends if the data are N(1, VARIANCE) under the condition and N(0, VARIANCE) without: CFG of
    scale w ends at w."""
    means = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    line = Mixture(means, torch.tensor(VARIANCE, dtype=torch.float64).sqrt())
    predict = guided(line, method, {"cond": {"label": torch.tensor([1])}, "uncond": {"label": torch.tensor([0])}})
    *_, path = sample(euler, predict, Path(means[:1]), levels)
    return float(path.x)


def at_best(cells: Cells, name: str) -> tuple[str, str, str]:
    """The scale at which a method scores best, its score there, and how that differs from CFG's at its best scale."""
    key, base = best(cells, name), best(cells, "cfg")
    if key is None or base is None:
        return "-", "-", "-"
    return named(key)[1], told(cells[key]["score"]), "-" if name == "cfg" else less(cells, key, base)


def best(cells: Cells, name: str) -> Key | None:
    """The cell of a method with the highest score, of equals that of the lowest scale; None if it has none."""
    own = [key for key in cells if key[0] == name]
    return max(own, key=lambda key: cells[key]["score"]["score"], default=None)


def less(cells: Cells, key: Key, base: Key) -> str:
    """The difference of two scores, paired over the prompts, with its interval."""
    if key not in cells or base not in cells:
        return "-"
    prompts = len(cells[key]["saturations"])
    own, theirs = (np.reshape(cells[k]["holds"], (prompts, -1)).mean(1) for k in (key, base))
    return str(intervals.estimate(own - theirs, (-1.0, 1.0)))


def named(key: Key) -> tuple[str, str]:
    name, scale = key
    return name, "-" if scale is None else f"{scale:g}"


def told(value: dict[str, float]) -> str:
    return str(intervals.Estimate(**value))


# ------------------------------------------------------------------------------------------------ adaptive guidance
def adaptive(size: Size, ag: AdaptiveGuidance, spacing: str | None) -> dict[str, Any]:
    """AG against CFG: the paired difference in score, evaluations, and seconds of batches of 16 in turns."""
    pipe, entries = _pipe(size), shapeeval.entries_of(size.prompts)
    if spacing is not None:
        noise = {"timestep_spacing": "linspace", f"use_{spacing}_sigmas": True}
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **noise)
    methods = {"cfg": CFG(ag.scale), "ag": ag}
    made = {
        n: shapeeval.evaluate(pipe, m, entries, size.adaptive_images, size.steps, batch_size=size.batch_size)
        for n, m in methods.items()
    }
    change = intervals.differences(made["ag"].results, made["cfg"].results)["overall"]
    seconds = paired({n: lambda m=m: _loop(pipe, m, size.steps) for n, m in methods.items()}, size.repeats)  # type: ignore[misc]
    return {
        **asdict(ag),
        "steps": size.steps,
        "spacing": spacing,
        "images": len(made["ag"].results),
        "score": asdict(shapeeval.scores(made["cfg"].results)["overall"]),
        "difference": asdict(change),
        "nfe": {name: e.made.nfe for name, e in made.items()},
        "nfe_saved": 1 - made["ag"].made.nfe / made["cfg"].made.nfe,
        "time_saved": 1 - statistics.median(seconds["ag"]) / statistics.median(seconds["cfg"]),
    }


@torch.no_grad()
def _loop(pipe: Any, method: Guidance, steps: int) -> None:
    prompts = [e["prompt"] for e in shapeeval.entries_of(3)][:16]
    with attach(pipe, method):
        pipe(prompts, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="latent")


# ------------------------------------------------------------------------------------------------ inversion
@torch.no_grad()
def inversion(size: Size, method: Guidance) -> dict[str, Any]:
    """PSNR against what the VAE alone makes of the pictures."""
    latent, rng = LatentModel(_pipe(size)), np.random.default_rng(1)
    captions, scenes = zip(*(draw.draw(rng) for _ in range(size.pictures)), strict=True)
    pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float()
    levels = latent.levels(size.inversion_steps)
    found: list[float] = []
    for i in range(0, size.pictures, 16):
        z, conds = latent.encode_images(pictures[i : i + 16]), latent.encode([str(c) for c in captions[i : i + 16]])
        again = latent.decode(edit(latent.denoiser, method, z, conds, conds, levels))
        error = ((again - latent.decode(z)) ** 2).flatten(1).mean(1)
        found += (-10 * error.clamp(min=1e-10).log10()).tolist()
    known = {"pictures": size.pictures, "steps": size.inversion_steps, "psnr": found}
    return asdict(intervals.estimate(found, (0.0, 100.0))) | known


def invert_all(folder: File, size: Size) -> None:
    for lam, omega in PAIRS[: 1 if size.pictures == QUICK.pictures else None]:
        cell(folder, f"inversion-cfgpp-{lam:g}", lambda lam=lam: inversion(size, CFGpp(lam)))  # type: ignore[misc]
        cell(folder, f"inversion-cfg-{omega:g}", lambda omega=omega: inversion(size, CFG(omega)))  # type: ignore[misc]


def _pipe(size: Size) -> Any:
    pipe = open_pipeline(size.model)
    pipe.set_progress_bar_config(disable=True)
    if size.model == "tiny-flow":  # Euler's method for all, which alone serves Rectified-CFG++
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    return pipe


def main(
    parts: Sequence[str],
    quick: bool,
    output_dir: str,
    ag: AdaptiveGuidance,
    spacing: str | None,
    size: Size,
    batches: Sequence[int],
) -> None:
    folder = File(output_dir) / ("" if size.model == "tiny" else size.model)
    print(f"{hardware()}, results in {folder}")
    label = f"adaptive-{ag.of}-{ag.scale:g}-{ag.threshold:g}-{ag.min_cfg_steps}-{size.steps}-{spacing or 'uniform'}"
    label += f"-{size.prompts or 'all'}-{size.adaptive_images}-{weights(size.model)}"
    methods = FLOW_METHODS if size.model == "tiny-flow" else METHODS
    todo: dict[str, Callable[[], object]] = {
        "overhead": lambda: [
            cell(folder, f"overhead-{batch}-{size.steps}-{size.repeats}", partial(overhead, size, batch))
            for batch in batches
        ],
        "sweep": lambda: sweep(folder, size, "shapeeval", methods),
        "hard": lambda: sweep(folder, size, "shapeeval-hard", methods),
        "classes": lambda: sweep(folder, size, "classes", ("none", "cfg", "gfcg")),
        "adaptive": lambda: cell(folder, label, lambda: adaptive(size, ag, spacing)),
        "inversion": lambda: invert_all(folder, size),
        "table": lambda: print_table(folder, size),
    }
    for part in parts or (todo if quick else ["overhead"]):
        todo[part]()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="overhead (the default), sweep, hard, classes, adaptive, ...")
    parser.add_argument("--quick", action="store_true", help="all parts, as small as can be")
    parser.add_argument("--output_dir", default="runs/bench_guidance")
    parser.add_argument("--scales", type=float, nargs="+", help="CFG scales of `sweep`, `hard` and `classes`")
    parser.add_argument("--evaluations", type=int, help="of an image in `sweep` and `classes`")
    parser.add_argument("--images", type=int, help="of a prompt in `sweep` and `classes`")
    parser.add_argument("--prompts", type=int, help="of each category; all without it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="of `overhead`")
    parser.add_argument("--repeats", type=int, help="paired rounds of `overhead` and `adaptive`, 30 without it")
    parser.add_argument("--scale", type=float, default=3.0, help="of `adaptive`")
    parser.add_argument("--threshold", type=float, default=AdaptiveGuidance.threshold, help="of `adaptive`")
    parser.add_argument("--min_cfg_steps", type=int, default=1, help="of `adaptive`")
    parser.add_argument("--of", choices=("output", "eps"), default=AdaptiveGuidance.of, help="of `adaptive`")
    parser.add_argument("--adaptive_images", type=int, help="of a prompt in `adaptive`")
    parser.add_argument("--spacing", choices=("karras", "exponential"), help="of sigmas in `adaptive`, not DDIM's")
    parser.add_argument("--steps", type=int, help="of the sampler, 25 without it")
    parser.add_argument("--batch_size", type=int, help="in `adaptive`, 16 without it")
    parser.add_argument("--model", choices=("tiny", "tiny-flow"), help="tiny without it")
    options = vars(parser.parse_args())
    ag = AdaptiveGuidance(**{name: options.pop(name) for name in ("scale", "threshold", "min_cfg_steps", "of")})
    sizes = {name: options.pop(name) for name in Size._fields if name in options}
    size = QUICK if options["quick"] else Size()
    main(**options, ag=ag, size=size._replace(**{name: value for name, value in sizes.items() if value is not None}))
