"""What the toolkit costs on one GPU, at the sizes that people run, within a few minutes: the table of the docs.

    python scripts/bench_gpu.py [PART ...] [--minutes 6] [--output runs/bench_gpu.jsonl] [--page FILE] [--small]

recipes    a step of alignprop, also with recomputed blocks, and of each policy recipe in 10 sampler steps (SD 1.5)
search     fk with eight particles (SD 1.5)
reno       the authors' update written out, and ours on one image and on eight, per image (SD 1.5, one step)
budget     alignprop within 6, 12 and 24 GiB: what was predicted, and the peak (SD 1.5)
loops      the stock pipeline, the same under attach(pipe, CFG), and our own loop (SD 1.5)
attention  the network forwards and backwards: by SDPA, the default, and by matrix products (SD 1.5)
compile    alignprop with --compile, whose first step compiles (SD 1.5)
modes      a backward pass through 10, 25 and 50 sampler steps: no gradient, a hand-written loop, and every gradient
           mode, each once after a run that warms up (SD 1.5)
sizes      the loops, a step of alignprop, ReNO and fk at the sizes of SDXL and SD3.5-M

The weights are random. The networks compute in bfloat16; --small runs thin ones on any device, which shows that the
script works. A measurement is a line of --output, and one that is there is not made again; one that fails is told and
not kept. Each part has a share of the minutes, and leaves what it does not use to those after it; no measurement is
begun after its part's share. The seconds of a step are the median of three after the first; the peak is the
allocator's, with the weights. --page writes the table as a page.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_loops
import torch
from bench_models import SIZES
from benching import Store, hardware, paired, peak_memory, reset_peak, spread, synchronize, table
from diffusers.models.attention_processor import AttnProcessor

from difftune.configs.recipes import AlignPropConfig
from difftune.files.output import write
from difftune.recipes import train
from difftune.recipes.catalogue import RECIPES
from difftune.search_runs.search import search
from rewards.registry import load
from solvers.latent import LatentModel

PROMPT = bench_loops.PROMPT
GROUPS = {"gradient_accumulation_steps": 2, "num_images_per_prompt": 4}  # two batches of four images of a prompt
POLICY: Mapping[str, Mapping[str, int]] = {
    "grpo": GROUPS,
    "ddpo": {},
    "nft": GROUPS,
    "d3po": {},
    "adjoint-matching": {},
}
FEW = 10  # steps of a sampler that all of a policy's images are trained on
MODES = ("full", "checkpoint", "truncated:5", "revolve:5", "adjoint:euler", "reversible:bdia", "lean")
Entry = Mapping[str, Any]  # {"what": {name: cell}}: a row of the table for each
Entries = Iterator[tuple[str, Callable[[], Entry]]]


class Bench:
    """The device, the sizes, and the pipeline that was used last: no two are held at a time."""

    def __init__(self, small: bool):
        self.small, self.device = small, "cuda" if torch.cuda.is_available() else "cpu"
        self.rounds, self.held = 1 if small else 5, ("", None)

    def pipe(self, size: str) -> Any:
        """The random pipeline of a size, in bfloat16."""
        if self.held[0] != size:
            self.drop()
            self.held = (size, SIZES[size](self.device, self.small).to(torch.bfloat16))
        return self.held[1]

    def fresh(self, size: str) -> Any:
        """The same, for what leaves an adapter behind: the next one is made anew."""
        pipe, self.held = self.pipe(size), ("", None)
        return pipe

    def drop(self) -> None:
        """Let go of the pipeline and of what the allocator keeps."""
        self.held = ("", None)
        gc.collect()
        reset_peak()


# ------------------------------------------------------------------------------------------------ loops


def loops(bench: Bench, sizes: Sequence[str] = ("SD 1.5",)) -> Entries:
    for size in sizes:
        for batch in (1, 4):
            yield f"loops of {size}, batch {batch}", partial(compared, bench, size, bench_loops.sampling, batch, 10)


def reno(bench: Bench, sizes: Sequence[str] = ("SD 1.5",), batches: Sequence[int] = (1, 8)) -> Entries:
    for size in sizes:
        for batch in batches:
            yield f"ReNO of {size}, batch {batch}", partial(compared, bench, size, bench_loops.reno, batch, 3)


def modes(bench: Bench) -> Entries:
    for steps in (5, 6) if bench.small else (10, 25, 50):
        yield f"{steps} steps", partial(compared, bench, "SD 1.5", bench_loops.gradients, 1, steps, rounds=1)
        for mode in MODES:
            yield f"{steps} steps, {mode}", partial(compared, bench, "SD 1.5", in_mode(mode), 1, steps, rounds=1)


def in_mode(mode: str) -> Callable[..., Any]:
    """One image's run in a gradient mode, with the way back."""
    return lambda pipe, batch, steps: {mode: bench_loops.rolled(pipe, batch, steps, mode)}


def compared(
    bench: Bench, size: str, runs: Callable[..., Any], batch: int, steps: int, rounds: int | None = None
) -> Entry:
    """Seconds of the first run, and the ratio of each other one to it, paired by round; the peak of all."""
    made = runs(bench.pipe(size), batch, min(steps, 6) if bench.small else steps)
    seconds = {}
    reset_peak()
    found = bench_loops.per_image(paired(made, rounds or bench.rounds), batch)
    first = next(iter(made))
    for name, values in found.items():
        middle = spread([a / b for a, b in zip(values, found[first], strict=True)])
        seconds[name] = f"{spread(values).median:.3f} s" + ("" if name == first else f" ({middle.median:.3f})")
    return {"what": seconds | {"peak of all": gib(peak_memory())}}


# ------------------------------------------------------------------------------------------------ training


def recipes(bench: Bench) -> Entries:
    yield "alignprop", partial(trained, bench, alignprop(bench))
    yield "alignprop, blocks recomputed", partial(trained, bench, alignprop(bench), blocks=True)
    for name, more in POLICY.items():
        steps = 4 if bench.small else FEW
        config = configured(bench, RECIPES[name].config, num_inference_steps=steps, **more)
        yield f"{name}, {steps} steps", partial(trained, bench, config)


def budget(bench: Bench) -> Entries:
    for size in ("400MiB", "1GiB") if bench.small else ("6GiB", "12GiB", "24GiB"):
        yield size, partial(trained, bench, alignprop(bench, memory_budget=size))


def compiled(bench: Bench) -> Entries:
    yield "alignprop", partial(trained, bench, alignprop(bench, compile=True))


def configured(bench: Bench, config: type, **more: Any) -> Any:
    """512 pixels, batch 4, CFG 7.5, 50 steps; four optimiser steps, of which the first warms up."""
    settings: dict[str, Any] = {
        "prompts": "animals",
        "reward": ["saturation"],
        "max_train_steps": 4,
        "max_skipped_steps": 0,
        "train_batch_size": 4,
        "num_inference_steps": 4 if bench.small else 50,
        "mixed_precision": "bf16",
    }
    return config(**settings | more)


def alignprop(bench: Bench, **more: Any) -> AlignPropConfig:
    """K = 10, or what the small model's steps allow."""
    most = 4 if bench.small else 10
    return configured(bench, AlignPropConfig, truncation_min=most, truncation_max=most, **more)


def trained(bench: Bench, config: Any, blocks: bool = False, size: str = "SD 1.5") -> Entry:
    """The images and the seconds of a step, the first one's, the peak, and what was resolved."""
    pipe, told = bench.fresh(size), {}
    if blocks:
        LatentModel(pipe).network.enable_gradient_checkpointing()
    reset_peak()
    seconds, began = [], time.perf_counter()

    def say(line: str) -> None:
        name, _, words = line.partition(": ")
        told[name] = words

    for _ in train(config, pipe=pipe, reward=load("saturation"), say=say):
        synchronize()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    images, median = config.train_batch_size * config.gradient_accumulation_steps, statistics.median(seconds[1:])
    found = {"seconds of the first step": f"{seconds[0]:.2f}"} if config.compile else {}
    found |= {f"seconds of a step of {images} images": f"{median:.2f}", "an image": f"{median / images:.3f}"}
    plan = {"plan": told["memory_budget"]} if "memory_budget" in told else {}
    return {"what": {**found, "peak": gib(peak_memory()), **plan}}


# ------------------------------------------------------------------------------------------------ the network, a search


def attention(bench: Bench) -> Entries:
    yield "batch 4", partial(network_step, bench)


def network_step(bench: Bench) -> Entry:
    """Forward and backward of the network alone, by SDPA and by matrix products."""
    pipe = bench.fresh("SD 1.5")
    model, network = LatentModel(pipe), pipe.unet.requires_grad_(False)
    with torch.no_grad():
        text, x = model.encode([PROMPT] * 4)["cond"]["encoder_hidden_states"], model.noise(4).to(model.dtype)
    time_step, usual = torch.tensor(500, device=x.device), network.attn_processors

    def step(processors: Any) -> None:
        network.set_attn_processor(processors)
        noise = x.clone().requires_grad_()
        network(noise, time_step, text, return_dict=False)[0].float().square().mean().backward()

    runs = {"SDPA": lambda: step(dict(usual)), "matrix products": lambda: step(AttnProcessor())}  # it empties the dict
    found = paired(runs, bench.rounds)
    ratio = spread([a / b for a, b in zip(found["matrix products"], found["SDPA"], strict=True)]).median
    cells = {name: f"{spread(values).median:.4f} s" for name, values in found.items()}
    return {"what": {**cells, "matrix products": f"{cells['matrix products']} ({ratio:.3f})"}}


def searched(bench: Bench, sizes: Sequence[str] = ("SD 1.5",)) -> Entries:
    for size in sizes:
        yield f"fk of {size}, 8 particles", partial(particles, bench, size)


def particles(bench: Bench, size: str) -> Entry:
    """Seconds of a search, its evaluations, and the peak."""
    steps, count = (3 if bench.small else 20), 8
    cost = 2 * steps * count  # CFG counts two
    settings = {"num_inference_steps": steps, "progress": False, "particles": count}
    pipe = bench.pipe(size)
    reset_peak()
    synchronize()
    began = time.perf_counter()
    nfe = int(search(pipe, [PROMPT], "fk", load("saturation"), cost, **settings).run().nfe.max())
    synchronize()
    seconds = time.perf_counter() - began
    return {"what": {"seconds": f"{seconds:.2f}", "evaluations": str(nfe), "peak": gib(peak_memory())}}


def sizes(bench: Bench) -> Entries:
    for size in [name for name in SIZES if name != "SD 1.5"]:
        yield from searched(bench, [size])
        yield from reno(bench, [size], [1])
        yield from loops(bench, [size])
        yield f"alignprop of {size}", partial(trained, bench, alignprop(bench, train_batch_size=2), size=size)


class Part(NamedTuple):
    """Some measurements, and their share of the time."""

    entries: Callable[[Bench], Entries]
    share: float


PARTS = {
    "recipes": Part(recipes, 6),
    "search": Part(searched, 1),
    "reno": Part(reno, 1),
    "budget": Part(budget, 4),
    "loops": Part(loops, 1),
    "attention": Part(attention, 1),
    "compile": Part(compiled, 4),
    "modes": Part(modes, 4),
    "sizes": Part(sizes, 8),
}


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


# ------------------------------------------------------------------------------------------------ all of it


def main(parts: Sequence[str], minutes: float, output: str, small: bool, page: str | None = None) -> None:
    if not small and not torch.cuda.is_available():
        raise SystemExit("these sizes need a CUDA GPU, and there is none: pass --small")
    bench, store, rows, late = Bench(small), Store(output), [], []
    ends, shares = time.perf_counter() + 60 * minutes, {name: PARTS[name].share for name in parts or PARTS}
    print(hardware(), flush=True)
    while shares:
        until, part = until_of(shares, ends), next(iter(shares))
        shares.pop(part)
        for name, measure in PARTS[part].entries(bench):
            key = f"{part} / {name} / {hardware()}{' / small' if small else ''}"
            if key not in store.read() and time.perf_counter() > until:
                late.append(f"{part} / {name}")
                continue
            found = attempted(bench, partial(store.measured, key, measure))
            rows += [[part, name, what, cell] for what, cell in found["what"].items()]
            print(key, found["what"], flush=True)
    told = table(["part", "of", "what", "measured"], rows)
    print(told)
    if late:
        print(f"not begun within {minutes:g} minutes: {', '.join(late)}")
    if page is not None:
        write(
            Path(page), f"# On a GPU\n\n`scripts/bench_gpu.py`, random weights in bfloat16; {hardware()}.\n\n{told}\n"
        )


def until_of(shares: Mapping[str, float], ends: float) -> float:
    """When the first of these parts may begin nothing more: its share of the time that is left to all."""
    now = time.perf_counter()
    return now + (ends - now) * next(iter(shares.values())) / sum(shares.values())


def attempted(bench: Bench, measure: Callable[[], Entry]) -> Entry:
    """The measurement, or the error in its place: one that fails does not cost the others their time on the GPU. It is
    not kept, so that it is attempted again, and nor is the pipeline that it was of."""
    try:
        return measure()
    except Exception as error:
        found = {"what": {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}}
    bench.drop()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=6, help="that all parts share")
    parser.add_argument("--output", default="runs/bench_gpu.jsonl")
    parser.add_argument("--page", help="Markdown file for the table")
    parser.add_argument("--small", action="store_true", help="thin models on any device: whether it works")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; known: {', '.join(PARTS)}")
    main(options.parts, options.minutes, options.output, options.small, options.page)
