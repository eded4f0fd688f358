"""Our loops beside the plainest that do the same: what the toolkit itself costs.

    python scripts/bench_loops.py [sampling gradients reno] [--batches 1 4] [--rounds 30] [--output FILE] [--small]

sampling    the stock pipeline, the same under attach(pipe, CFG), and our own loop
gradients   a run without a gradient, a hand-written loop with torch.utils.checkpoint around each network call, and
            `rollout` in mode "checkpoint", each with its backward pass
reno        the update of ReNO's authors written out (SGD with Nesterov's momentum on the noise, its gradient clipped,
            one image, all recomputed), and ours on one image and on eight, in seconds of each image; both have the
            same reward, and neither differentiates the last image, after which the noise moves no more

Ratios are to the first of each, paired by round: median, its 95 % interval, and quartiles. On a CPU the seconds are
this process's own; leave the machine quiet all the same, since other work takes the caches. Every measurement is a line
of --output, and one that is there is not made again.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from benching import Run, Store, hardware, paired, ratios, spread, table, weights
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from difftune import models
from difftune.pipelines.engine import step_of, wants_noise
from difftune.reno.optimizer import ReNO
from guidance.attach.handle import attach
from guidance.guided import guided
from guidance.methods.catalogue import CFG
from rewards.registry import load
from solvers.denoiser import Path, lines
from solvers.latent import LatentModel
from solvers.rollout.modes import rollout
from solvers.samplers.catalogue import euler, sample

PROMPT = "a red circle left of a blue square"
SCALE = 5.0
PER_IMAGE = "ours, per image"


def sampling(pipe: Any, batch: int, steps: int) -> dict[str, Run]:
    prompts = [PROMPT] * batch
    latent = LatentModel(pipe, decode_batch=batch)  # the pipeline decodes all at once

    @torch.no_grad()
    def stock() -> None:
        pipe(prompts, num_inference_steps=steps, guidance_scale=SCALE, output_type="pt")

    def attached() -> None:
        with attach(pipe, CFG(SCALE)):
            stock()

    @torch.no_grad()
    def own() -> None:
        predict = guided(latent.denoiser, CFG(SCALE), latent.encode(prompts))
        *_, path = sample(euler, predict, Path(latent.noise(batch)), latent.levels(steps))
        latent.decode(path.x)

    return {"stock": stock, "attach": attached, "own loop": own}


def gradients(pipe: Any, batch: int, steps: int) -> dict[str, Run]:
    """With respect to the noise; the network's weights are frozen."""
    model, network = LatentModel(pipe), LatentModel(pipe).network.requires_grad_(False)
    with torch.no_grad():
        conds, start = model.encode([PROMPT] * batch), model.noise(batch)
    levels, denoiser = model.levels(steps), model.denoiser
    texts = torch.cat([conds[name]["encoder_hidden_states"] for name in ("uncond", "cond")])
    times = [denoiser.clock(at) for at in levels]

    def guess(x: Tensor, time: Tensor) -> Tensor:
        free, bound = network(torch.cat([x, x]).to(texts), time, texts, return_dict=False)[0].chunk(2)
        return free + SCALE * (bound - free)

    def end(x: Tensor, recompute: bool) -> Tensor:
        for time, (now, then) in zip(times, pairwise(levels), strict=False):
            p, q, m, n = (float(value) for value in lines(denoiser.prediction_type, now))
            out = checkpoint(guess, x, time, use_reentrant=False) if recompute else guess(x, time)
            x = then.alpha * (p * x + q * out.float()) + then.sigma * (m * x + n * out.float())
        return x

    @torch.no_grad()
    def plain() -> None:
        end(start, recompute=False)

    def hand() -> None:
        end(start.clone().requires_grad_(), recompute=True).square().sum().backward()

    def ours() -> None:
        predict = guided(model.denoiser, CFG(SCALE), conds)
        rollout(euler, predict, start.clone().requires_grad_(), levels, "checkpoint").x.square().sum().backward()

    return {"no gradient": plain, "hand loop": hand, "rollout(checkpoint)": ours}


def rolled(pipe: Any, batch: int, steps: int, mode: str) -> Run:
    """`rollout` in a gradient mode, and its way back to the noise and to the text, which every mode reaches."""
    model = LatentModel(pipe)
    model.network.requires_grad_(False)
    with torch.no_grad():
        conds, start, levels = model.encode([PROMPT] * batch), model.noise(batch), model.levels(steps)
    added = [torch.randn_like(start) for _ in levels[1:]] if wants_noise(mode, euler) else None

    def run() -> None:
        x, text = (t.clone().requires_grad_() for t in (start, conds["cond"]["encoder_hidden_states"]))
        cond = {**conds["cond"], "encoder_hidden_states": text}
        predict = guided(model.denoiser, CFG(SCALE), {**conds, "cond": cond})
        rollout(step_of(mode, euler), predict, x, levels, mode, added).x.square().sum().backward()

    return run


def reno(pipe: Any, batch: int, iterations: int) -> dict[str, Run]:
    """A few-step model's one step; `batch` images of ours, one of the authors'. Both have the same reward, make as many
    images, and differentiate all but the last, since after it the noise moves no more."""
    model, reward = LatentModel(pipe), load("tiny-clip")
    network, vae = model.network.requires_grad_(False), pipe.vae.requires_grad_(False)
    call, dtype = model.family.call, network.dtype
    assert call is not None

    def authors() -> Tensor:
        with torch.no_grad():
            cond, x = model.encode([PROMPT])["cond"], model.noise(1)
        cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
        now, _ = model.levels(1)
        time, (p, q, *_) = model.denoiser.clock(now), lines(model.denoiser.prediction_type, now)

        def judged(noise: Tensor) -> tuple[Tensor, Tensor]:
            out = checkpoint(lambda z: call(network, z.to(dtype), time, cond), noise, use_reentrant=False)
            latent = model.family.latents.to_vae(vae, p * noise + q * out.float()).to(dtype)
            image = checkpoint(lambda z: vae.decode(z, return_dict=False)[0], latent, use_reentrant=False)
            image = (image.float() / 2 + 0.5).clamp(0, 1)
            return image.detach(), reward(image, [PROMPT]).sum()

        noise, best = torch.nn.Parameter(x), (x, -torch.inf)
        optimizer = torch.optim.SGD([noise], lr=5.0, momentum=0.9, nesterov=True)
        for left in reversed(range(iterations)):
            with torch.set_grad_enabled(left > 0):
                image, score = judged(noise)
            best = max(best, (image, score.item()), key=lambda found: found[1])
            if left:
                optimizer.zero_grad()
                norm = noise.norm()
                (0.01 * (norm.square() / 2 - (noise.numel() - 1) * norm.log()) - score).backward()
                torch.nn.utils.clip_grad_norm_([noise], 0.1)
                optimizer.step()
        return best[0]

    def ours() -> Tensor:
        settings = {"learning_rate": 5.0, "grad_clip": 0.1, "progress": False}
        return ReNO(pipe, reward, **settings).optimize([PROMPT] * batch, iterations).images

    return {"authors": authors, PER_IMAGE: ours}


PARTS = {  # the runs, the embedded models that they need, the steps
    "sampling": (sampling, ["tiny"], 25),
    "gradients": (gradients, ["tiny"], 10),
    "reno": (reno, ["tiny-turbo", "tiny-clip"], 10),
}


def measured(part: str, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    make, (name, *_), _ = PARTS[part]
    pipe = models.load(name).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    runs = make(pipe, batch, steps)
    seconds = per_image(paired(runs, rounds), batch)
    first = next(iter(runs))
    return {"on": hardware(), "seconds": seconds, "ratios": ratios(seconds, first) | _more(seconds)}


def per_image(seconds: Mapping[str, Sequence[float]], batch: int) -> dict[str, list[float]]:
    """Seconds of each run, those `PER_IMAGE` divided by the images that it made."""
    return {name: [s / (batch if name == PER_IMAGE else 1) for s in values] for name, values in seconds.items()}


def _more(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The ratio to a hand-written loop, where there is one beside the base."""
    if "hand loop" not in seconds:
        return {}
    pairs = zip(seconds["rollout(checkpoint)"], seconds["hand loop"], strict=True)
    return {"rollout(checkpoint) / hand loop": spread([a / b for a, b in pairs])}


def told(part: str, batch: int, found: Mapping[str, Any]) -> list[list[Any]]:
    base = next(iter(found["seconds"]))
    rows = [[part, batch, base, f"{1000 * statistics.median(found['seconds'][base]):.1f} ms", ""]]
    for name, values in found["ratios"].items():
        median, q1, q3, low, high = values
        rows.append([part, batch, name, f"{median:.3f} [{low:.3f}, {high:.3f}]", f"{q1:.3f} to {q3:.3f}"])
    return rows


def main(parts: Sequence[str], batches: Sequence[int] | None, rounds: int, output: str, small: bool) -> None:
    store, rows = Store(output), []
    print(hardware())
    for part in parts or PARTS:
        for batch in batches or ([1, 8] if part == "reno" else [1, 4]):
            names, steps = PARTS[part][1], 2 if small else PARTS[part][2]
            key = f"{part}-{batch}-{steps}-{rounds}-{weights(*names)}-{hardware()}"
            rows += told(part, batch, store.measured(key, lambda: measured(part, batch, rounds, steps)))  # noqa: B023
    print(table(["loop", "batch", "run", "median (ratio to the first of its block)", "quartiles"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", help="1 and 4; 1 and 8 of reno")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", default="runs/bench_loops.jsonl")
    parser.add_argument("--small", action="store_true", help="two steps: whether it works")
    main(**vars(parser.parse_args()))
