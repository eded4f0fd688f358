"""Seconds and memory of an optimiser step of `alignprop` and `d3po` on a model of Stable Diffusion 1.5's size.

    python scripts/bench_training.py                     a CUDA GPU: 512 x 512, batch 4, bf16, 50 steps, CFG 7.5
    python scripts/bench_training.py --small             an embedded model on any device: whether it works

The weights are random: they cost what trained ones cost. `alignprop` carries the gradient through the last 10 of 50
steps by recomputing each; `d3po` trains on all 50. Both score images by `saturation`, which costs next to nothing, and
train a LoRA of rank 4. `blocks` recomputes the network block by block too. The memory is the allocator's peak, weights
included, and the seconds are the median of the steps after the first.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from bench_models import sd15
from benching import hardware, heading, peak_memory, reset_peak, row, synchronize

from difftune import models
from difftune.configs.recipes import AlignPropConfig, D3POConfig
from difftune.pipelines import engine
from difftune.recipes import train
from rewards.registry import load
from solvers.families.attention import Verdict, choose, obstacle
from solvers.memory.checkpointing import block_checkpointing


def setting(recipe: str, steps: int, small: bool) -> Any:
    """The configuration of a recipe; its first step warms up."""
    shared: dict[str, Any] = {
        "prompts": "animals",
        "max_train_steps": steps + 1,
        "train_batch_size": 4,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "mixed_precision": "bf16",
    }
    if small:
        shared |= {"num_inference_steps": 4, "mixed_precision": "no"}
    most = shared["num_inference_steps"] if small else 10
    if recipe == "alignprop":
        return AlignPropConfig(reward=["saturation"], truncation_min=most, truncation_max=most, **shared)
    return D3POConfig(reward=["saturation"], **shared)


def timed(pipe: Any, config: Any) -> tuple[float, float]:
    """(seconds of a step, peak memory in GB); a number that was not finite ends the run with an error."""
    reset_peak()
    seconds, began = [], time.perf_counter()
    for _ in train(replace(config, max_skipped_steps=0), pipe=pipe, reward=load("saturation")):
        synchronize()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return median(seconds[1:]), (peak_memory() or float("nan")) / 1e9


def variants() -> Iterator[tuple[str, bool]]:
    """(attention, block checkpointing) that can run here."""
    yield from (("sdpa", False), ("sdpa", True))
    if reason := obstacle():
        return print(reason)
    verdict = choose("cuda", torch.bfloat16)
    print(verdict.why)
    if not verdict.why.startswith("xformers fails"):
        yield "xformers", False


def measure(recipes: Sequence[str], steps: int, small: bool) -> None:
    print(hardware())
    chosen, usual = list(variants()), engine.verdict
    print("\n" + heading(["recipe", "attention", "blocks", "seconds a step", "peak, GB"]), flush=True)
    for recipe in recipes:
        for backend, blocks in chosen:
            pipe = models.load("tiny") if small else sd15("cuda")
            engine.verdict = lambda xformers, network, name=backend: Verdict(name, "measured")  # the probe may differ
            try:
                with block_checkpointing(pipe.unet) if blocks else nullcontext():
                    seconds, peak = timed(pipe, setting(recipe, steps, small))
            finally:
                engine.verdict = usual
            print(row([recipe, backend, "yes" if blocks else "no", f"{seconds:.2f}", f"{peak:.1f}"]), flush=True)
            del pipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["alignprop", "d3po"], choices=["alignprop", "d3po"])
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument("--small", action="store_true", help="an embedded model")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        raise SystemExit("Stable Diffusion 1.5's size needs a CUDA GPU, and there is none: pass --small")
    measure(args.recipes, args.steps, args.small)
