"""What the toolkit costs on one GPU, at the sizes that people run, within a few minutes: the table of the docs.

    python scripts/bench_gpu.py [PART ...] [--minutes 6] [--output runs/bench_gpu.jsonl] [--small]

loops      the stock pipeline, the same under attach(pipe, CFG), and our own loop (SD 1.5, SDXL, SD3.5-M)
rollout    a backward pass through 10, 25 and 50 sampler steps: no gradient, a hand-written loop, "checkpoint" (SD 1.5)
recipes    a step of alignprop, also with recomputed blocks, and of each policy recipe in 10: seconds, peak (SD 1.5)
budget     alignprop within 6, 12 and 24 GiB: what was predicted, and the peak (SD 1.5)
compile    a training step of the network alone, as it is and compiled (SD 1.5)
reno       the authors' update written out, and ours on one image and on eight (SD 1.5, one step)
search     fk with eight particles (SD 1.5)

The weights are random. The networks compute in bfloat16; --small runs thin float32 ones on any device, which shows that
the script works. A measurement is a line of --output, and one that is there is not made again; after --minutes none is
begun. The peak is the allocator's, with the weights.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import bench_loops
import torch
from bench_models import SIZES
from benching import Store, hardware, paired, peak_memory, reset_peak, spread, synchronize, table

from difftune.configs.recipes import AlignPropConfig
from difftune.recipes import train
from difftune.recipes.catalogue import RECIPES
from difftune.search_runs.search import search
from rewards.registry import load
from solvers.latent import LatentModel

PROMPT = bench_loops.PROMPT
GROUPS = {"gradient_accumulation_steps": 2, "num_images_per_prompt": 4}  # two batches of four images of a prompt
POLICY: Mapping[str, Mapping[str, int]] = {
    "ddpo": {},
    "grpo": GROUPS,
    "nft": GROUPS,
    "d3po": {},
    "adjoint-matching": {},
}
FEW = 10  # steps of a sampler that all of a policy's images are trained on
Entry = Mapping[str, Any]  # {"what": {name: cell}}: a row of the table for each


class Bench:
    """The device, the sizes, and the pipeline that was used last: no two are held at a time."""

    def __init__(self, small: bool, dtype: torch.dtype | None = None):
        self.small, self.device = small, "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = dtype or (torch.float32 if small else torch.bfloat16)
        self.rounds, self.held = 1 if small else 5, ("", None)

    def pipe(self, size: str) -> Any:
        """The random pipeline of a size."""
        if self.held[0] != size:
            self.held = ("", None)
            reset_peak()
            self.held = (size, SIZES[size](self.device, self.small).to(self.dtype))
        return self.held[1]

    def fresh(self, size: str) -> Any:
        """The same, for what leaves an adapter behind: the next one is made anew."""
        pipe, self.held = self.pipe(size), ("", None)
        return pipe


# ------------------------------------------------------------------------------------------------ parts


def loops(bench: Bench) -> Iterator[tuple[str, Callable[[], Entry]]]:
    for size in SIZES:
        for batch in (1, 4):
            yield f"{size}, batch {batch}", partial(compared, bench, size, bench_loops.sampling, batch, 10)


def rollouts(bench: Bench) -> Iterator[tuple[str, Callable[[], Entry]]]:
    for steps in (2, 3) if bench.small else (10, 25, 50):
        yield f"{steps} steps", partial(compared, bench, "SD 1.5", bench_loops.gradients, 1, steps)


def reno(bench: Bench) -> Iterator[tuple[str, Callable[[], Entry]]]:
    for batch in (1, 8):
        yield f"batch {batch}", partial(compared, bench, "SD 1.5", bench_loops.reno, batch, 3)


def compared(bench: Bench, size: str, runs: Callable[..., Any], batch: int, steps: int) -> Entry:
    """Seconds of the first run, and the ratio of each other one to it, paired by round; the peak of all."""
    made = runs(bench.pipe(size), batch, 2 if bench.small else steps)
    seconds = {}
    reset_peak()
    found = bench_loops.per_image(paired(made, bench.rounds), batch)
    first = next(iter(made))
    for name, values in found.items():
        middle = spread([a / b for a, b in zip(values, found[first], strict=True)])
        seconds[name] = f"{spread(values).median:.3f} s" + ("" if name == first else f" ({middle.median:.3f})")
    return {"what": seconds | {"peak of all": gib(peak_memory())}}


def recipes(bench: Bench) -> Iterator[tuple[str, Callable[[], Entry]]]:
    yield "alignprop", partial(trained, bench, alignprop(bench))
    yield "alignprop, blocks recomputed", partial(trained, bench, alignprop(bench), blocks=True)
    for name, more in POLICY.items():
        steps = 4 if bench.small else FEW
        config = configured(bench, RECIPES[name].config, num_inference_steps=steps, **more)
        yield f"{name}, {steps} steps", partial(trained, bench, config)


def configured(bench: Bench, config: type, **more: Any) -> Any:
    """512 pixels, batch 4, CFG 7.5, 50 steps; three optimiser steps, of which the first warms up."""
    settings: dict[str, Any] = {
        "prompts": "animals",
        "reward": ["saturation"],
        "max_train_steps": 3,
        "train_batch_size": 4,
        "num_inference_steps": 4 if bench.small else 50,
        "mixed_precision": "no" if bench.small else "bf16",
    }
    return config(**settings | more)


def alignprop(bench: Bench, **more: Any) -> AlignPropConfig:
    """K = 10, or what the small model's steps allow."""
    most = 4 if bench.small else 10
    return configured(bench, AlignPropConfig, truncation_min=most, truncation_max=most, **more)


def trained(bench: Bench, config: Any, blocks: bool = False) -> Entry:
    """Seconds of a step and the peak, and what was resolved."""
    pipe, told = bench.fresh("SD 1.5"), {}
    if blocks:
        pipe.unet.enable_gradient_checkpointing()
    reset_peak()
    seconds, began = [], time.perf_counter()

    def say(line: str) -> None:
        name, _, words = line.partition(": ")
        told[name] = words

    for _ in train(config, pipe=pipe, reward=load("saturation"), say=say):
        synchronize()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    plan = {"plan": told["memory_budget"]} if "memory_budget" in told else {}
    return {"what": {"seconds a step": f"{min(seconds[1:]):.2f}", "peak": gib(peak_memory()), **plan}}


def budget(bench: Bench) -> Iterator[tuple[str, Callable[[], Entry]]]:
    for size in ("400MiB", "1GiB") if bench.small else ("6GiB", "12GiB", "24GiB"):
        yield size, partial(trained, bench, alignprop(bench, memory_budget=size))


def compiled(bench: Bench) -> Iterator[tuple[str, Callable[[], Entry]]]:
    yield "batch 4", partial(network_step, bench)


def network_step(bench: Bench) -> Entry:
    """Forward and backward of the network alone, which is what a compiler can change."""
    pipe = bench.fresh("SD 1.5")
    model = LatentModel(pipe)
    with torch.no_grad():
        text, x = model.encode([PROMPT] * 4)["cond"]["encoder_hidden_states"], model.noise(4).to(model.dtype)
    time_step, network = torch.tensor(500, device=x.device), pipe.unet.requires_grad_(True)
    made = torch.compile(network, dynamic=False)

    def step(called: Any) -> None:
        called(x, time_step, text, return_dict=False)[0].float().square().mean().backward()
        network.zero_grad(set_to_none=True)

    found = paired({"as it is": lambda: step(network), "compiled": lambda: step(made)}, bench.rounds)
    medians = {name: spread(values).median for name, values in found.items()}
    return {"what": {name: f"{value:.4f} s" for name, value in medians.items()}}


def searched(bench: Bench) -> Iterator[tuple[str, Callable[[], Entry]]]:
    yield "8 particles", partial(particles, bench)


def particles(bench: Bench) -> Entry:
    """Seconds of a search, and of one image of it."""
    steps, count = (3 if bench.small else 20), 8
    cost = 2 * steps * count  # CFG counts two
    reset_peak()
    synchronize()
    began = time.perf_counter()
    run = search(
        bench.pipe("SD 1.5"),
        [PROMPT],
        "fk",
        load("saturation"),
        cost,
        num_inference_steps=steps,
        progress=False,
        particles=count,
    )
    nfe = int(run.run().nfe.max())
    synchronize()
    seconds = time.perf_counter() - began
    return {"what": {"seconds": f"{seconds:.2f}", "evaluations": str(nfe), "peak": gib(peak_memory())}}


PARTS: dict[str, Callable[[Bench], Iterator[tuple[str, Callable[[], Entry]]]]] = {
    "recipes": recipes,
    "budget": budget,
    "loops": loops,
    "rollout": rollouts,
    "reno": reno,
    "search": searched,
    "compile": compiled,
}


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


# ------------------------------------------------------------------------------------------------ all of it


def main(parts: Sequence[str], minutes: float, output: str, small: bool) -> None:
    if not small and not torch.cuda.is_available():
        raise SystemExit("these sizes need a CUDA GPU, and there is none: pass --small")
    bench, store, rows, late = Bench(small), Store(output), [], []
    ends = time.perf_counter() + 60 * minutes
    print(hardware(), flush=True)
    for part in parts or PARTS:
        for name, measure in PARTS[part](bench):
            key = f"{part} / {name} / {hardware()}{' / small' if small else ''}"
            if key not in store.read() and time.perf_counter() > ends:
                late.append(f"{part} / {name}")
                continue
            found = attempted(bench, partial(store.measured, key, measure))
            rows += [[part, name, what, cell] for what, cell in found["what"].items()]
            print(key, found["what"], flush=True)
    print(table(["part", "of", "what", "measured"], rows))
    if late:
        print(f"not begun after {minutes:g} minutes: {', '.join(late)}")


def attempted(bench: Bench, measure: Callable[[], Entry]) -> Entry:
    """The measurement, or the error in its place: one that fails does not cost the others their time on the GPU. It is
    not kept, so that it is attempted again, and nor is the pipeline that it was of."""
    try:
        return measure()
    except Exception as error:
        bench.held = ("", None)
        return {"what": {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=6, help="after which no measurement is begun")
    parser.add_argument("--output", default="runs/bench_gpu.jsonl")
    parser.add_argument("--small", action="store_true", help="thin models on any device: whether it works")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; known: {', '.join(PARTS)}")
    main(options.parts, options.minutes, options.output, options.small)
