"""AlignProp and DDPO of TRL beside ours, by `bench_peers.py`, which makes TRL's environment the first time."""

import itertools
from argparse import Namespace
from functools import partial
from typing import Any, NamedTuple

import bench_peers
from bench_peers import OURS, PEERS, TRIALS, TRIED

from evidence.rows import Results, Row, Section

MODELS = ("tiny", "tiny-clip", "tiny-classifier")


class Size(NamedTuple):
    """How much is trained."""

    seconds: float = 240
    seeds: tuple[int, ...] = (0,)
    quick: bool = False


QUICK = Size(60, (0,), True)


def given(size: Size, results: Results) -> Namespace:
    """What `bench_peers.py` is told."""
    return Namespace(seconds=size.seconds, quick=size.quick, folder=results.folder / "peers")


def run_row(name: str, seed: int, size: Size, results: Results) -> Row:
    train = bench_peers.train_peer if name in PEERS else bench_peers.train_ours
    options: Any = PEERS.get(name) or OURS[name]
    settings = {"run": name, "seed": seed, "size": list(size), "options": options, "packages": bench_peers.PACKAGES}
    place = f"peers/{bench_peers.file_name(name)}-{seed}"
    return Row(place, settings, MODELS, partial(train, name, seed, given(size, results)), "peers")


def trial_row(library: str, recipe: str, trial: str, size: Size, results: Results) -> Row:
    attempt = bench_peers.try_peer if library == "trl" else bench_peers.try_ours
    settings = {"trial": trial, "library": library, "recipe": recipe, "packages": bench_peers.PACKAGES}
    measure = partial(attempt, trial, recipe, given(size, results))
    return Row(f"peers/try-{library}-{recipe}-{trial}", settings, MODELS, measure, "peers")


def runs(size: Size, results: Results) -> dict[str, list[Row]]:
    return {name: [run_row(name, seed, size, results) for seed in size.seeds] for name in (*PEERS, *OURS)}


def trials(size: Size, results: Results) -> dict[tuple[str, str, str], Row]:
    keys = itertools.product(("trl", "difftune"), TRIED, TRIALS)
    return {key: trial_row(*key, size, results) for key in keys}


def section(size: Size, results: Results) -> Section:
    wanted, tried = runs(size, results), trials(size, results)
    rows = [*itertools.chain.from_iterable(wanted.values()), *tried.values()]
    known = {name: found for name, own in wanted.items() if (found := results.all_of(own))}
    answers = {key: found for key, row in tried.items() if (found := results.read(row)) is not None}
    texts = []
    if known:
        texts += [
            f"TRL 0.23.1 and difftune train `tiny` on `{bench_peers.REWARD}`, {size.seconds:g} s each on one thread, "
            f"{bench_peers.STEPS} steps under CFG {bench_peers.SCALE:g} where not said otherwise; what is trained is "
            "judged on the way, on the same held-out prompts and noises. Differences are to the untrained model.",
            bench_peers.told(known),
        ]
    if len(answers) == len(tried):
        texts += ["What each can do, tried:", bench_peers.told_trials(answers)]
    return Section("Other libraries", rows, (), "\n\n".join(texts))
