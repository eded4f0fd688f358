"""The gradient modes side by side, and their peers: memory, time, network calls and the gradient's error.

    python scripts/bench_gradients.py                              the embedded model on this machine's processor
    python scripts/bench_gradients.py --steps 10 --batch 1         a quick look
    python scripts/bench_gradients.py --large                      a GPU: an SD1.5-size UNet with random weights

Each row is one run of N sampler steps under classifier-free guidance and its backward pass, with respect to the
noise and the LoRA. kept: bytes between forward and backward; peak: the most at once, both beside the weights. time: in
units of N steps of euler without a gradient. calls: passes through the network, in units of N. error, cosine: of the
gradient, in float64, against `full` through euler; a mode that brings a solver of its own differentiates another
sampler, and its error says how far the two gradients are apart.

Peers: autograd through the sampler written by hand, torch.utils.checkpoint over whole steps, and torchdiffeq's
odeint_adjoint (Euler) on the probability flow dw/dtau = eps - x0 of the same sampler.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import benching
import torch
from benching import median_seconds, peak_memory, reset_peak
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torchdiffeq import odeint_adjoint

from difftune import models
from difftune.pipelines import lora
from difftune.pipelines.engine import step_of, wants_noise
from guidance.guided import GuidedPredict, guided
from guidance.methods.catalogue import CFG
from solvers.denoiser import Path
from solvers.families.attention import attention, choose, obstacle
from solvers.latent import LatentModel
from solvers.memory.checkpointing import block_checkpointing
from solvers.memory.live import LiveBytes
from solvers.noise import Noise
from solvers.rollout.modes import MODES, rollout
from solvers.samplers.catalogue import euler, gaussian

OPTIONS = {  # a mode that is not named here runs without an option
    "truncated": ("{half}", "5"),
    "revolve": ("8", "3"),
    "adjoint": ("euler", "rk4", "exact_endpoint"),
    "reversible": ("bdia", "mccallum-foster:midpoint"),
}
PROMPT = "a red circle left of a blue square"


class Job(NamedTuple):
    """What is differentiated: x -> end of the run, and what the gradient is asked for."""

    predict: GuidedPredict
    x: Tensor
    levels: Sequence[Noise]
    weights: Sequence[Tensor]


@dataclass
class Row:
    """One line of the table."""

    name: str
    steps: int
    kept: float  # MB
    peak: float  # MB
    time: float
    calls: float
    error: float | None = None
    cosine: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------------------ what is compared

Run = Callable[[Job], Tensor]


def modes(steps: int) -> Iterator[str]:
    """The strings of every mode that MODES holds."""
    for name in MODES:
        for option in OPTIONS.get(name, ("",)):
            option = option.format(half=max(1, steps // 2))
            if name not in ("truncated", "revolve") or int(option) <= steps:
                yield f"{name}:{option}" if option else name


def ours(gradient: str) -> Run:
    def run(job: Job) -> Tensor:
        generator, steps = torch.Generator(job.x.device).manual_seed(1), len(job.levels) - 1
        noise = [gaussian(job.x, generator) for _ in range(steps)] if wants_noise(gradient, euler) else None
        return rollout(step_of(gradient, euler), job.predict, job.x, job.levels, gradient, noise).x

    return run


def plain(job: Job) -> Tensor:
    """Autograd through the sampler, written by hand."""
    x = job.x
    for now, then in pairwise(job.levels):
        p = job.predict(Path(x), now)
        x = then.alpha * p.x0 + then.sigma * p.eps
    return x


def whole_steps(job: Job) -> Tensor:
    """torch.utils.checkpoint around each step."""
    path = Path(job.x)
    for now, then in pairwise(job.levels):
        step = lambda x, now=now, then=then: euler(job.predict, Path(x), now, then).x  # noqa: E731
        path = Path(recompute(step, path.x, use_reentrant=False))
    return path.x


class Flow(nn.Module):
    """dw/ds of w = x / (alpha + sigma) in s = 1 - tau, tau = sigma / (alpha + sigma): s grows along the run."""

    def __init__(self, job: Job):
        super().__init__()
        self.job = job

    def forward(self, s: Tensor, w: Tensor) -> Tensor:
        at = Noise(s.detach().double().cpu(), 1 - s.detach().double().cpu())
        p = self.job.predict(Path(w), at)
        return p.x0 - p.eps


def continuous(job: Job) -> Tensor:
    """torchdiffeq: the adjoint equation is solved by Euler, backwards on the same grid."""
    total = [at.alpha + at.sigma for at in job.levels]
    grid = torch.stack([at.alpha / t for at, t in zip(job.levels, total, strict=True)]).to(job.x)
    start = job.x / total[0].to(job.x)
    ends = odeint_adjoint(Flow(job), start, grid, method="euler", adjoint_params=tuple(job.weights))
    return ends[-1] * total[-1].to(job.x)


PEERS: dict[str, Run] = {
    "plain autograd": plain,
    "torch.utils.checkpoint, steps": whole_steps,
    "torchdiffeq odeint_adjoint": continuous,
}


# ------------------------------------------------------------------------------------------------ how it is measured


def gradient(run: Run, job: Job) -> Tensor:
    """The gradient of a fixed nonlinear function of the end; zeros if there is none."""
    found = torch.autograd.grad(loss(run(job)), [job.x, *job.weights], allow_unused=True)
    return torch.cat([torch.zeros(t.numel(), dtype=t.dtype, device=t.device) if g is None else g.flatten()
                      for g, t in zip(found, [job.x, *job.weights], strict=True)])  # fmt: skip


def loss(x: Tensor) -> Tensor:
    return (x.sin() + x.square() / 2).mean()


def memory(run: Run, job: Job) -> tuple[float, float]:
    """(kept, peak) in MB; the peak is the allocator's on a GPU, that of live tensors on a CPU."""
    gc.collect()
    cuda = job.x.is_cuda
    before = reset_peak()
    with LiveBytes() as live:
        value = loss(run(job))
        kept = live.now
        torch.autograd.grad(value, [job.x, *job.weights], allow_unused=True)
    most = peak_memory()
    peak = most - before if cuda and most is not None else live.peak
    return kept / 1e6, peak / 1e6


def measured(name: str, run: Run, job: Job, repeats: int, base: float, exact: Tensor | None) -> Row:
    steps = len(job.levels) - 1
    kept, peak = memory(run, job)
    rows = job.predict.nfe
    found = gradient(run, job)
    calls = (job.predict.nfe - rows) / (2 * len(job.x) * steps)
    row = Row(name, steps, kept, peak, median_seconds(lambda: gradient(run, job), repeats) / base, calls)
    if exact is not None:
        difference = (found - exact).norm() / exact.norm()
        cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
        row.error, row.cosine = difference.item(), cosine.item()
    return row


def sampling(job: Job) -> None:
    with torch.no_grad():
        plain(job)


def table(jobs: Sequence[Job], wanted: Sequence[str], repeats: int) -> Iterator[Row]:
    """The rows, as they are measured. A mode that refuses (a setting that would be wrong) says so in its row."""
    for job in jobs:
        steps = len(job.levels) - 1
        base, exact = median_seconds(lambda job=job: sampling(job), repeats), None
        if job.x.dtype == torch.float64:
            exact = gradient(ours("full"), job)
        runs = {**{mode: ours(mode) for mode in modes(steps)}, **PEERS}
        for name, run in runs.items():
            if wanted and not any(name.startswith(word) for word in wanted):
                continue
            try:
                yield measured(name, run, job, repeats, base, exact)
            except (ValueError, torch.OutOfMemoryError) as error:
                yield Row(name, steps, 0, 0, 0, 0, note=str(error).splitlines()[0][:100])
            gc.collect()


# ------------------------------------------------------------------------------------------------ what runs


def adapted(pipe: Any, rank: int = 4) -> list[Tensor]:
    """LoRA weights that are not at their zero start."""
    weights = list(lora.add(pipe, rank).values())
    with torch.no_grad():
        for i, weight in enumerate(weights):
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            weight += 0.02 * drawn.to(weight)
    return weights


def job_of(pipe: Any, conds: Any, x: Tensor, levels: Sequence[Noise], weights: Sequence[Tensor]) -> Job:
    denoiser = LatentModel(pipe).denoiser
    return Job(guided(denoiser, CFG(5.0), conds), x.requires_grad_(), levels, weights)


def embedded(name: str, steps: Sequence[int], batch: int) -> list[Job]:
    """Jobs of an embedded model in float64."""
    pipe = models.load(name, torch_dtype=torch.float64)
    weights = adapted(pipe)
    for weight in weights:
        weight.data = weight.data.double()
    model = LatentModel(pipe)
    with torch.no_grad():
        conds = model.encode([PROMPT] * batch)
    x = model.noise(batch, torch.Generator().manual_seed(0)).double()
    return [job_of(pipe, conds, x.clone(), model.levels(n), weights) for n in steps]


@contextmanager
def large(steps: Sequence[int], backend: str, blocks: bool) -> Iterator[list[Job]]:
    """Jobs of a UNet of Stable Diffusion 1.5's size, random weights, bfloat16, 512 x 512, LoRA in float32."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from solvers.families.table import FAMILIES
    from solvers.latent import NetworkDenoiser
    from solvers.levels import Clock, levels_of

    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to(torch.bfloat16).requires_grad_(False)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=list(lora.ATTENTION)))
    weights = [p for p in unet.parameters() if p.requires_grad]
    for weight in weights:
        weight.data = 0.02 * torch.randn_like(weight.data, dtype=torch.float32)
    conds = {k: {"encoder_hidden_states": torch.randn(1, 77, 768, device="cuda")} for k in ("cond", "uncond")}
    denoiser = NetworkDenoiser(unet, FAMILIES["sd"], Clock(scheduler), "eps")
    x = torch.randn(1, 4, 64, 64, device="cuda")
    with ExitStack() as stack:
        stack.enter_context(attention(unet, backend))
        if blocks:
            stack.enter_context(block_checkpointing(unet))
        jobs = []
        for n in steps:
            predict = guided(denoiser, CFG(5.0), conds)
            jobs.append(Job(predict, x.clone().requires_grad_(), levels_of(scheduler, n), weights))
        yield jobs


# ------------------------------------------------------------------------------------------------ the table


HEADER = ("mode", "steps", "kept, MB", "peak, MB", "time / sampling", "calls / N", "error", "cosine")


def line(row: Row) -> str:
    if row.note:
        return benching.row([row.name, row.steps, row.note, *[""] * 5])
    quality = ["", ""] if row.error is None else [f"{row.error:.1e}", f"{row.cosine:.6f}"]
    numbers = [f"{row.kept:.2f}", f"{row.peak:.1f}", f"{row.time:.2f}", f"{row.calls:.2f}"]
    return benching.row([row.name, row.steps, *numbers, *quality])


def show(title: str, rows: Iterator[Row]) -> list[Row]:
    print(f"\n{title}\n\n{benching.heading(HEADER)}", flush=True)
    found = []
    for row in rows:
        found.append(row)
        print(line(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="names, or how they begin")
    parser.add_argument("--large", action="store_true", help="an SD1.5-size UNet on a CUDA GPU")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    rows: dict[str, list[Row]] = {}
    where = benching.hardware()
    if args.large:
        rows = on_gpu(args, where)
    else:
        title = f"{args.model}, batch {args.batch}, CFG 5, LoRA, float64; {where}"
        rows[title] = show(title, table(embedded(args.model, args.steps, args.batch), args.only, args.repeats))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({title: [vars(row) for row in found] for title, found in rows.items()}, file, indent=1)


def on_gpu(args: argparse.Namespace, where: str) -> dict[str, list[Row]]:
    """With SDPA, with SDPA and block checkpointing, and with xformers where it runs."""
    if not torch.cuda.is_available():
        raise SystemExit("--large needs a CUDA GPU, and there is none: leave it out")
    rows = {}
    reason = obstacle()
    print(f"attention: {reason or choose('cuda', torch.bfloat16).why}")
    settings = [("sdpa", False), ("sdpa", True), *([] if reason else [("xformers", False)])]
    for backend, blocks in settings:
        extra = ", block checkpointing" if blocks else ""
        title = f"SD1.5-size UNet, 512 x 512, batch 1, CFG 5, LoRA, bfloat16, {backend}{extra}; {where}"
        with large(args.steps, backend, blocks) as jobs:
            rows[title] = show(title, table(jobs, args.only, args.repeats))
    return rows


if __name__ == "__main__":
    main()
