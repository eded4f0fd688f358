"""The gradient modes of `rollout` side by side: seconds, and megabytes kept between forward and backward.

    python scripts/bench_rollout.py [--model tiny] [--steps 25] [--batch 4] [--repeats 3]
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from difftune import models
from guidance.guided import guided
from guidance.methods import CFG
from solvers.latent import LatentModel
from solvers.rollout import rollout
from solvers.samplers import euler


class Kept:
    """Counts the bytes of the tensors that autograd saves, each storage once, parameters left out."""

    def __init__(self, parameters: list[Tensor]):
        self.own, self.seen = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def measure(model: LatentModel, gradient: str, steps: int, batch: int) -> tuple[float, float, Tensor]:
    """(seconds, megabytes, gradient) of one rollout and its backward pass."""
    x = model.noise(batch, torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        conds = model.encode(["a red circle left of a blue square"] * batch)
    kept, began = Kept(list(model.network.parameters())), time.perf_counter()
    with saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        path = rollout(euler, guided(model.denoiser, CFG(5.0), conds), x, model.levels(steps), gradient)
    held = sum(kept.seen.values()) / 1e6
    (grad,) = torch.autograd.grad(path.x.square().sum(), x, allow_unused=True)
    return time.perf_counter() - began, held, torch.zeros_like(x) if grad is None else grad


def main(model: str, steps: int, batch: int, repeats: int) -> None:
    pipe = models.load(model)
    pipe.unet.requires_grad_(False)
    latent, exact, base = LatentModel(pipe), None, 0.0
    print(f"{model}, {steps} steps, batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for gradient in ("full", "checkpoint", f"truncated:{steps}", "truncated:5"):
        runs = [measure(latent, gradient, steps, batch) for _ in range(repeats + 1)][1:]
        seconds = statistics.median(run[0] for run in runs)
        exact, base = (runs[0][2], seconds) if exact is None else (exact, base)
        same = "same bits" if torch.equal(runs[0][2], exact) else "other gradient"
        print(f"{gradient:14} {seconds:7.2f} s  {seconds / base:5.2f} of full  keeps {runs[0][1]:8.1f} MB  {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    main(**vars(parser.parse_args()))
