"""attach(pipe, CFG) beside the stock pipeline, and our own loop beside both: seconds per image, as ratios of one run.

    python scripts/bench_guidance.py [--model tiny] [--steps 25] [--batch 8] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from difftune import models
from guidance.attach import attach
from guidance.guided import guided
from guidance.methods import CFG
from solvers.denoiser import Path
from solvers.latent import LatentModel
from solvers.samplers import euler, sample


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each; the runs take turns, so that a drift of the machine falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def main(model: str, steps: int, batch: int, repeats: int) -> None:
    pipe = models.load(model)
    pipe.set_progress_bar_config(disable=True)
    prompts, latent = ["a red circle left of a blue square"] * batch, LatentModel(pipe)

    def stock() -> object:
        return pipe(prompts, num_inference_steps=steps, guidance_scale=5.0, output_type="pt").images

    def attached() -> object:
        with attach(pipe, CFG(5.0)):
            return stock()

    def own() -> object:
        predict = guided(latent.denoiser, CFG(5.0), latent.encode(prompts))
        *_, path = sample(euler, predict, Path(latent.noise(batch)), latent.levels(steps))
        return latent.decode(path.x)

    found = timed({"stock pipeline": stock, "attach(CFG)": attached, "own loop": own}, repeats)
    print(f"{model}, {steps} steps, batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, seconds in found.items():
        print(f"{name:16} {1000 * seconds / batch:8.1f} ms an image   {seconds / found['stock pipeline']:.3f} of stock")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    main(**vars(parser.parse_args()))
