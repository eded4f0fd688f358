"""Guidance on `tiny-flow` at equal evaluations over CFG's scales, adaptive guidance, and inversion on `tiny`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import bench_guidance
from benching import table

from difftune.evaluation.intervals import Estimate
from difftune.lookup import takes_scale
from evidence.rows import Claim, Results, Row, Section, above, paired, said
from guidance.methods.catalogue import CFG, AdaptiveGuidance, CFGpp

METHODS = ("none", "cfg", "cfgpp", "rectified-cfgpp", "apg", "mambo-g", "fbg", "ag", "interval")
MODELS = ("tiny-flow", "tiny-classifier")
HIGH = 6.0  # the scale at which the claims of APG and Rectified-CFG++ are looked at


class Size(NamedTuple):
    """How much is drawn."""

    sweep: bench_guidance.Size = bench_guidance.Size(
        (1.5, 3.0, HIGH, 9.0), images=2, adaptive_images=4, repeats=6, model="tiny-flow"
    )
    pairs: tuple[tuple[float, float], ...] = bench_guidance.PAIRS
    scale: float = 3.0  # of adaptive guidance


QUICK = Size(bench_guidance.QUICK._replace(model="tiny-flow", scales=(HIGH,)), bench_guidance.PAIRS[:1])


def cell(name: str, scale: float | None, size: Size) -> Row:
    settings = {"guidance": name, "scale": scale, "size": repr(size.sweep)}
    place = f"guidance/{name}" if scale is None else f"guidance/{name}-{scale:g}"
    return Row(place, settings, MODELS, partial(measured, name, scale, size.sweep))


def measured(name: str, scale: float | None, size: bench_guidance.Size) -> dict[str, Any]:
    return bench_guidance.measured(name, scale, bench_guidance.prompts_of("shapeeval", size), size)


def cells(size: Size) -> list[Row]:
    return [
        cell(name, scale, size) for name in METHODS for scale in (size.sweep.scales if takes_scale(name) else (None,))
    ]


def adaptive(size: Size) -> Row:
    ag = AdaptiveGuidance(size.scale)
    settings = {"ag": asdict(ag), "size": repr(size.sweep)}
    return Row("guidance/adaptive", settings, MODELS, partial(bench_guidance.adaptive, size.sweep, ag, None))


def inversions(size: Size) -> list[tuple[Row, Row]]:
    """Of each pair of scales: CFG++ and CFG, on `tiny`."""
    sweep = size.sweep._replace(model="tiny")

    def row(name: str, method: Any) -> Row:
        settings = {"method": repr(method), "size": repr(sweep)}
        return Row(f"guidance/{name}", settings, ("tiny",), partial(bench_guidance.inversion, sweep, method))

    return [(row(f"inversion-cfgpp-{a:g}", CFGpp(a)), row(f"inversion-cfg-{b:g}", CFG(b))) for a, b in size.pairs]


def rows(size: Size) -> list[Row]:
    return [*cells(size), adaptive(size), *(row for pair in inversions(size) for row in pair)]


# ------------------------------------------------------------------------------------------------ what is said


def section(size: Size, results: Results) -> Section:
    known = {row.name.removeprefix("guidance/"): found for row in cells(size) if (found := results.read(row))}
    ag = results.read(adaptive(size))
    pairs = dict(zip(size.pairs, map(results.all_of, inversions(size)), strict=True))
    measured_pairs = {scales: found for scales, found in pairs.items() if found is not None}
    claims = [*apg_claims(size, known), *rectified_claims(size, known), *([ag_claim(ag)] if ag else [])]
    claims += cfgpp_claims(measured_pairs)
    return Section("Guidance", rows(size), claims, "\n\n".join(texts(size, known, ag, measured_pairs)))


Found = Mapping[str, Any]


def by_prompt(found: Found, size: Size) -> list[float]:
    """The share of each prompt's pictures that follow it."""
    each = size.sweep.images
    return [sum(found["holds"][i : i + each]) / each for i in range(0, len(found["holds"]), each)]


def apg_claims(size: Size, known: Mapping[str, Found]) -> Iterator[Claim]:
    apg, cfg = (known.get(f"{name}-{HIGH:g}") for name in ("apg", "cfg"))
    if apg and cfg:
        less = paired(apg["saturations"], cfg["saturations"])
        oracle = paired(by_prompt(apg, size), by_prompt(cfg, size))
        ours = f"saturation {said(less, 4)} to CFG at scale {HIGH:g}; oracle {said(oracle)}"
        holds = less.score < 0 if less.excludes_zero else None
        paper, command = "less saturation at high scales", "difftune sample --guidance apg"
        yield Claim("APG", "guidance/apg.md", paper, ours, holds, command)


def rectified_claims(size: Size, known: Mapping[str, Found]) -> Iterator[Claim]:
    """By nominal scales: in few steps the method guides less than CFG of the scale that is its own in the limit."""
    ours, cfg = (known.get(f"{name}-{HIGH:g}") for name in ("rectified-cfgpp", "cfg"))
    if ours and cfg:
        change = paired(by_prompt(ours, size), by_prompt(cfg, size))
        paper, command = "better than CFG at high scales", "difftune sample --guidance rectified-cfgpp"
        told = f"oracle {said(change)} to CFG at the nominal scale {HIGH:g}"
        yield Claim("Rectified-CFG++", "guidance/rectified-cfgpp.md", paper, told, above(change), command)


def ag_claim(found: Found) -> Claim:
    """A quarter is saved, and no more than .03 of the prompts are lost, by the interval."""
    change = Estimate(**found["difference"])
    holds = found["nfe_saved"] >= 0.2 and change.low > -0.03
    ours = f"{100 * found['nfe_saved']:.1f} % saved, oracle {said(change)} to CFG at scale {found['scale']:g}"
    paper, command = "a quarter of the evaluations saved at no loss", "difftune sample --guidance ag"
    verdict = True if holds else False if found["nfe_saved"] < 0.2 or change.high < -0.03 else None
    return Claim("adaptive guidance", "guidance/ag.md", paper, ours, verdict, command)


def cfgpp_claims(pairs: Mapping[tuple[float, float], Any]) -> Iterator[Claim]:
    if pairs:
        gains = {scales: paired(a["psnr"], b["psnr"], 100.0) for scales, (a, b) in pairs.items()}
        (lam, omega), change = max(gains.items(), key=lambda item: item[0][0] * (item[0][0] <= 0.6))
        ours = f"{said(change, 1)} dB at lambda {lam:g} to CFG {omega:g}"
        command = "difftune sample --guidance cfgpp"
        yield Claim("CFG++", "guidance/cfgpp.md", "better inversion than CFG", ours, above(change), command)


def texts(size: Size, known: Mapping[str, Found], ag: Found | None, pairs: Mapping[Any, Any]) -> Iterator[str]:
    if known:
        yield (
            f"`tiny-flow`, ShapeEval, {size.sweep.images} images a prompt, all methods at {size.sweep.evaluations} "
            "evaluations of an image; intervals are 95 %, over prompts:"
        )
        rows_ = [sweep_line(found) for found in known.values()]
        yield table(["method", "scale", "steps", "NFE", "ShapeEval", "Fréchet", "saturation", "Vendi"], rows_)
    if ag:
        yield (
            f"Adaptive guidance beside CFG {ag['scale']:g}, paired, {ag['images']} images, {ag['steps']} steps: "
            f"{100 * ag['nfe_saved']:.1f} % of the evaluations and {100 * ag['time_saved']:.0f} % of the time saved, "
            f"oracle {said(Estimate(**ag['difference']))}."
        )
    if pairs:
        steps = size.sweep.inversion_steps
        yield f"Inversion of {size.sweep.pictures} rendered pictures by `tiny` and back, in {steps} steps:"
        rows_ = [inversion_line(scales, *found) for scales, found in pairs.items()]
        yield table(["lambda", "CFG's scale", "CFG++, dB", "CFG, dB", "difference"], rows_)


def sweep_line(found: Found) -> list[Any]:
    distance = found["frechet"]
    estimates = [Estimate(**found[name]) for name in ("score", "saturation", "diversity")]
    cells_ = [estimates[0], f"{distance['score']:.1f} [{distance['low']:.1f}, {distance['high']:.1f}]", *estimates[1:]]
    scale = "-" if found["scale"] is None else f"{found['scale']:g}"
    return [found["guidance"], scale, found["steps"], f"{found['nfe']:.1f}", *cells_]


def inversion_line(scales: tuple[float, float], plus: Found, cfg: Found) -> list[Any]:
    change = paired(plus["psnr"], cfg["psnr"], 100.0)
    return [*scales, f"{plus['score']:.2f}", f"{cfg['score']:.2f}", said(change, 2)]
