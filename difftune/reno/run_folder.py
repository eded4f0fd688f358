"""`difftune optimize`: noise optimisation from the command line, with its files, its checkpoints and its pictures."""

import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from difftune import processes
from difftune.configs.noise import RenoConfig
from difftune.configs.written import CONFIG, settings_yaml
from difftune.errors import DiskError, UserError
from difftune.files import checkpoint
from difftune.files.checkpoint import Say, State
from difftune.files.claim import Claim
from difftune.files.noises import NOISE, noises_of
from difftune.files.output import as_json, png, remove, sweep
from difftune.files.pictures import read_picture
from difftune.lookup import method_of, reward_named, reward_weights
from difftune.models import check_model
from difftune.models import load as load_model
from difftune.pipelines.compiled import check_compile, compiled
from difftune.pipelines.engine import Engine, check_engine, kernels, offload_of
from difftune.pipelines.fingerprint import check_resumed, digest_of
from difftune.pipelines.shared import claimed_by_main, done_by_all, made_by_main
from difftune.reno.named import needs_gradient
from difftune.reno.optimizer import Live, ReNO, Result
from difftune.reno.settings import NoiseSettings
from difftune.reports import figures
from difftune.reports.sheets import Cell, sheet
from rewards.compose import parse_rewards
from rewards.monitor import Monitor
from rewards.registry import Reward, entry
from solvers.latent import LatentModel

CHECKPOINTS, RESULT = "checkpoints", "optimize.json"
OWN = re.compile(r"\d{3}-(before|after)\.png|\d{3}-path\.(gif|webp)|(grid|curves)\.png|noise\.safetensors|config\.yaml")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FREE = {"iterations", "checkpointing_steps", "resume_from_checkpoint", "output_dir", "animation"}  # of a resumed run
FRAMES = 50  # of an animation, at most
FRAME_MS = 120
MONITOR = Monitor()


class Made(NamedTuple):
    """A batch of samples, optimised."""

    result: Result
    frames: Tensor  # (iterations, B, 3, H, W), uint8


def optimize_in_folder(
    config: RenoConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None
) -> dict[str, Any]:
    """Pictures before and after, their paths, curves, optimize.json and noise.safetensors in a new folder.

    Returns what optimize.json holds. Nothing is written unless all of it can be, except the checkpoints that
    `checkpointing_steps` asks for. SIGTERM and Ctrl-C save one more, and end with 143 and 130.
    """
    check_optimize(config, pipe, reward)
    say = show or processes.say_once
    with claimed_by_main(config.output_dir) as claim:
        done = made_by_main(lambda: made_before(claim, config))
        if done is not None:
            say(f"{config.output_dir} was finished: nothing remains to do")
            return done
        summary, found = optimize_batches(config, claim, say, pipe, reward)
        if claim is not None:
            claim.results([*optimize_files(config, found), (CONFIG, settings_yaml(config)), (RESULT, as_json(summary))])
            claim.end(CHECKPOINTS)
    if summary.get("parting"):
        say(f"{config.held_out} fell while the reward rose: {summary['parting']['says']}")
    return summary


def made_before(claim: Claim | None, config: RenoConfig) -> dict[str, Any] | None:
    """The summary of a run that had ended; otherwise the main process makes the folder ready."""
    assert claim is not None
    if claim.ended and config.resume_from_checkpoint:
        return json.loads((claim.path / RESULT).read_text("utf-8"))
    prepare(claim, config)
    return None


def optimize_batches(
    config: RenoConfig, claim: Claim | None, say: Say, pipe: Any, reward: Reward | None
) -> tuple[dict[str, Any], list[Made]]:
    """The contents of optimize.json, and every batch; each is made by one of the processes."""
    started, reno = time.perf_counter(), make_reno(config, pipe, reward)
    if torch.cuda.is_available() and pipe is None:
        reno.pipe.to("cuda")
    network, exact = LatentModel(reno.pipe, reno.embedded_guidance).network, config.deterministic
    with (
        kernels(config.enable_xformers_memory_efficient_attention, exact, network) as attention,
        compiled(reno.pipe, config.compile, guidance=reno.guidance) as blocks,
    ):
        batches = list(batches_of(config))
        plan = reno.planned(batches[0].prompts)
        engine = Engine(plan, attention, exact, offload_of(config.offload, network.device)).lines(plan.gradient)
        engine |= precision(reno) | ({} if blocks is None else {"compile": blocks})
        for name, line in engine.items():
            say(f"{name}: {line}")
        start = None if config.start is None else start_of(config, reno)
        found = done_by_all([partial(optimize_batch, config, reno, batch, start, claim, say) for batch in batches])
    return {**optimize_summary(config, found), "engine": engine, "seconds": time.perf_counter() - started}, found


ROUGH = 0.05  # of unit noise: an error of the first step's that may turn a gradient around


def precision(reno: ReNO) -> dict[str, str]:
    """A caution, if the first step multiplies the rounding of the network's output by much: nothing otherwise.

    Of an eps network, x' = alpha' (x - sigma eps) / alpha + sigma' eps: one step from alpha = 0.068 multiplies by 15.
    """
    model = LatentModel(reno.pipe, reno.embedded_guidance)
    now, then = reno.levels(model)[:2]
    gain = float(then.alpha * now.sigma / now.alpha - then.sigma)
    rounding = torch.finfo(model.dtype).eps
    if model.denoiser.prediction_type != "eps" or gain * rounding < ROUGH:
        return {}
    kind = str(model.dtype).removeprefix("torch.")
    return {
        "precision": f"{kind} rounds eps by {rounding:.1g}, which the first step multiplies by {gain:.0f}: "
        "the gradient may point elsewhere; keep the network in float32"
    }


def make_reno(config: RenoConfig, pipe: Any, reward: Reward | None) -> ReNO:
    """The ReNO that the settings describe."""
    return ReNO(
        load_model(config.model, dtype=DTYPES[config.mixed_precision]) if pipe is None else pipe,
        parse_rewards(config.reward) if reward is None else reward,
        None if config.held_out is None else reward_named({config.held_out: 1.0}, gradient=False),
        **vars(noise_settings(config)),
    )


def noise_settings(config: RenoConfig) -> NoiseSettings:
    """The settings of the optimisation itself: those that go by the same name, and the guidance as an object.

    Raises UserError for an unknown name or an invalid setting.
    """
    shared = {field.name for field in fields(NoiseSettings)} & {field.name for field in fields(RenoConfig)}
    return NoiseSettings(**{name: getattr(config, name) for name in shared} | {"guidance": method_of(config)})


def check_optimize(config: RenoConfig, pipe: Any = None, reward: Reward | None = None) -> None:
    """UserError for the first invalid setting, before anything is loaded."""
    if not config.prompt:
        raise UserError("there is no prompt to optimise: give at least one --prompt")
    check_engine(None, config.enable_xformers_memory_efficient_attention)
    check_compile(config)
    gradient = needs_gradient(noise_settings(config).update)
    reward_weights(config.reward if reward is None else reward, gradient)
    check_names(config)
    if pipe is None:
        check_model(config.model)


def check_names(config: RenoConfig) -> None:
    """UserError for a held-out reward or a file to start from that is not there."""
    if config.start is not None and not Path(config.start).is_file():
        raise UserError(f"--start {config.start} is not a file: give a noise.safetensors or a picture")
    if config.held_out is not None:
        entry(config.held_out)
        if config.held_out in reward_weights(config.reward):
            raise UserError(f"held_out {config.held_out!r} is optimised: what is held out must be another")


# ------------------------------------------------------------------------------------------------ batches, checkpoints


@dataclass(frozen=True)
class Batch:
    """Samples that are optimised together."""

    number: int
    prompts: list[str]
    first: int  # number of its first sample


def batches_of(config: RenoConfig) -> Iterator[Batch]:
    """Each prompt `seeds_per_prompt` times, `batch_size` at a time."""
    samples = every(config)
    for number, start in enumerate(range(0, len(samples), config.batch_size)):
        yield Batch(number, samples[start : start + config.batch_size], start)


def every(config: RenoConfig) -> list[str]:
    """The prompt of each sample."""
    return [prompt for prompt in config.prompt for _ in range(config.seeds_per_prompt)]


def prepare(claim: Claim, config: RenoConfig) -> None:
    """Make the folder ready for a new run, or for one that is resumed from its checkpoints. UserError otherwise.

    What a killed run left that has no whole checkpoint is removed, and so are results that are not all there.
    """
    places = [path for path in (claim.path / CHECKPOINTS).glob("*") if path.is_dir()]
    for place in places:
        sweep(place)
    resumable, killed = any(checkpoint.checkpoints(place) for place in places), CHECKPOINTS in claim.held()
    if resumable:
        claim.keep(CHECKPOINTS)
    else:
        remove(claim.path / CHECKPOINTS)
    claim.clear()
    if resumable and config.resume_from_checkpoint is None:
        raise UserError(f"{claim.path} holds an unfinished run: go on with --resume_from_checkpoint latest")
    held = [name for name in claim.held() if name != CHECKPOINTS]
    if killed and RESULT not in held and all(OWN.fullmatch(name) for name in held):
        for name in held:
            remove(claim.path / name)
    elif held:
        path = claim.path
        raise UserError(f"{path} holds another run ({held[0]}): nothing was written, choose another --output_dir")
    claim.note(CHECKPOINTS)


def optimize_batch(
    config: RenoConfig, reno: ReNO, batch: Batch, start: Tensor | None, claim: Claim | None, say: Say
) -> Made:
    """One batch, from its newest checkpoint if the run is resumed."""
    folder = Path(config.output_dir, CHECKPOINTS, f"{batch.number:03d}")
    checkpoint.sort_out(folder, say)
    state = None if config.resume_from_checkpoint is None else checkpoint.resumed(folder, "latest")
    if state is not None:
        same_run(config, state)
        check_resumed(reno.pipe, state.info.get("model_digest"))
        say(f"batch {batch.number}: resuming from iteration {state.step}")
    call: dict[str, Any] = {"iterations": config.iterations, "seed": config.seed + batch.first, "state": state}
    call["start"] = start if start is None or len(start) == 1 else start[batch.first : batch.first + len(batch.prompts)]
    frames = [] if state is None else list(state.tensors["frames"])
    keeper = Keeper(config, claim, folder, frames, digest_of(reno.pipe))
    lives = reno.iterate(batch.prompts, **call)
    hidden = None if processes.process().is_main_process else True
    best = follow_iterations(keeper, tqdm(lives, "ReNO", config.iterations, initial=len(frames), disable=hidden))
    return Made(best or replace(reno, progress=False).optimize(batch.prompts, **call), torch.stack(frames))


@dataclass
class Keeper:
    """The pictures of a batch so far, and where it stands; saves that, each iteration once."""

    config: RenoConfig
    claim: Claim | None  # of the main process
    folder: Path
    frames: list[Tensor]
    model: str | None  # its digest
    live: Live | None = None
    saved: int | None = None

    def see(self, live: Live) -> None:
        """Take an iteration into account."""
        self.live = live
        self.frames.append((live.images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu())

    def save(self) -> None:
        """Write the checkpoint of the last iteration, unless there is one."""
        if self.live is not None and self.live.progress.iteration != self.saved:
            checkpoint.save(self.folder, with_frames(self.config, self.live.state, self.frames, self.model), limit=1)
            if self.claim is not None:
                self.claim.keep(CHECKPOINTS)
            self.saved = self.live.progress.iteration


def follow_iterations(keeper: Keeper, lives: Iterable[Live]) -> Result | None:
    """The end of a run whose pictures are collected and whose checkpoints are saved; None if it was at its end.

    After an error the last whole iteration is saved, if checkpoints are.
    """
    steps = keeper.config.checkpointing_steps
    with processes.stopping() if steps else nullcontext(processes.Stop()) as stop:
        try:
            for live in lives:
                keeper.see(live)
                if steps and (live.progress.iteration % steps == 0 or stop.number):
                    keeper.save()
                if stop.number:
                    stop.leave(live.progress.iteration)
        except Exception:
            with suppress(DiskError):
                if steps:
                    keeper.save()
            raise
        if steps:
            keeper.save()
    return None if keeper.live is None else keeper.live.best


def with_frames(config: RenoConfig, state: State, frames: Sequence[Tensor], model: str | None) -> State:
    """The state with the pictures so far, the settings and the model's digest."""
    tensors = {**state.tensors, "frames": torch.stack(list(frames))}
    return State(state.step, tensors, {**state.info, "config": settings_of(config), "model_digest": model})


def settings_of(config: RenoConfig) -> dict[str, Any]:
    """The settings as they are written down: the same ones for a run that was resumed and for one that was not."""
    return {**asdict(config), "resume_from_checkpoint": None}


@checkpoint.going_on()
def same_run(config: RenoConfig, state: State) -> None:
    """UserError, naming the first, if settings are not those that the state was made with."""
    checkpoint.same_settings(asdict(config), {**asdict(RenoConfig()), **state.info["config"]}, FREE)


# ------------------------------------------------------------------------------------------------ where it begins


def start_of(config: RenoConfig, reno: ReNO) -> Tensor:
    """The noises that --start says, one for all samples or one for each."""
    assert config.start is not None
    if config.start.endswith(".safetensors"):
        return noises_of(config.start)
    height, width = LatentModel(reno.pipe).size(*reno.size)
    picture = read_picture(config.start)
    if picture.shape[1:] != (height, width):
        size = f"{picture.shape[1]} x {picture.shape[2]}"
        raise UserError(f"--start {config.start} is {size} pixels, and the model makes {height} x {width}: resize it")
    noises = [reno.inverted(picture[None], prompt, config.inversion_steps) for prompt in config.prompt]
    return torch.cat(noises).repeat_interleave(config.seeds_per_prompt, dim=0)


# ------------------------------------------------------------------------------------------------ what is written


def optimize_summary(config: RenoConfig, found: Sequence[Made]) -> dict[str, Any]:
    """The contents of optimize.json: the settings, and each sample's rewards, iteration by iteration."""
    results = [made.result for made in found]
    samples = [sample_of(result, row) for result in results for row in range(len(result.images))]
    mean = {
        "reward_before": torch.cat([r.rewards_before for r in results]).double().mean().item(),
        "reward_after": torch.cat([r.rewards for r in results]).double().mean().item(),
    }
    both = {} if config.held_out is None else held_out_of(samples, results)
    return {"settings": settings_of(config), **mean, **both, "iterations": config.iterations, "prompts": samples}


def sample_of(result: Result, row: int) -> dict[str, Any]:
    """One sample's part of optimize.json."""
    history = [numbers(record, row) for record in result.history if not record.total[row].isnan()]
    found = {
        "prompt": result.prompts[row],
        "seed": result.seeds[row],
        "reward_before": result.rewards_before[row].item(),
        "reward_after": result.rewards[row].item(),
        "norm_before": result.noises_before[row].norm().item(),
        "norm_after": result.noises[row].norm().item(),
        "reward_calls": int(result.reward_calls[row]),
        "stopped": result.stopped[row],
        "best_iteration": max(range(len(history)), key=lambda i: history[i]["total"]),
    }
    if result.history[0].held_out is not None:
        found["parting"] = parted(result.parting(row))
    return {**found, "history": history}


def numbers(record: Any, row: int) -> dict[str, Any]:
    """One iteration of a sample."""
    found = {
        "rewards": {name: scores[row].item() for name, scores in record.parts.items()},
        "total": record.total[row].item(),
        "regularizer": record.regularizer[row].item(),
        "grad_norm": record.grad_norm[row].item(),
    }
    return found if record.held_out is None else {**found, "held_out": record.held_out[row].item()}


def parted(parting: Any) -> dict[str, Any] | None:
    """The iteration at which the rewards part, counted from 0, and how far they do."""
    return None if parting is None else {**parting._asdict(), "says": str(parting)}


def held_out_of(samples: Sequence[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
    """The held-out reward of the first and of the best images, and where the mean curves part."""
    before = [s["history"][0]["held_out"] for s in samples]
    after = [s["history"][s["best_iteration"]]["held_out"] for s in samples]
    mean = [weighted_mean([(r.curve(name), len(r.images)) for r in results]) for name in ("total", "held_out")]
    found = {"held_out_before": sum(before) / len(before), "held_out_after": sum(after) / len(after)}
    return {**found, "parting": parted(MONITOR(*mean))}


def weighted_mean(curves: Sequence[tuple[list[float], int]]) -> list[float]:
    """The weighted mean of curves at each iteration; a curve that has ended keeps its last value."""
    length = max(len(values) for values, _ in curves)
    total = sum(weight for _, weight in curves)
    return [sum(values[min(i, len(values) - 1)] * weight for values, weight in curves) / total for i in range(length)]


def optimize_files(config: RenoConfig, found: Sequence[Made]) -> Iterable[tuple[str, bytes]]:
    """Names and contents of the pictures, the paths, the curves and the noise."""
    rows, i = [], 0
    for made in found:
        for row in range(len(made.result.images)):
            cells = []
            for when, images, rewards in before_and_after(made.result):
                picture = images[row].permute(1, 2, 0).float().cpu().numpy()
                cells.append(Cell([picture], f"{when}: {float(rewards[row]):.3g}"))
                yield f"{i:03d}-{when}.png", png(picture)
            if config.animation != "none":
                yield f"{i:03d}-path.{config.animation}", animation(made.frames[:, row], config.animation)
            rows.append((made.result.prompts[row], cells))
            i += 1
    yield "grid.png", sheet(rows)
    yield "curves.png", curves_of([made.result for made in found])
    yield NOISE, save(noises([made.result for made in found]))


def before_and_after(result: Result) -> tuple[tuple[str, Tensor, Tensor], ...]:
    """The pictures and their rewards, under their names."""
    before = ("before", result.images_before, result.rewards_before)
    return before, ("after", result.images, result.rewards)


def noises(results: Sequence[Result]) -> dict[str, Tensor]:
    """The contents of noise.safetensors."""
    found = {
        "noise": torch.cat([r.noises for r in results]).cpu(),
        "noise_before": torch.cat([r.noises_before for r in results]).cpu(),
    }
    embeddings = [r.embeddings for r in results if r.embeddings is not None]
    return {**found, "embedding": torch.cat(embeddings).cpu()} if embeddings else found


def animation(frames: Tensor, kind: str) -> bytes:
    """Pictures (t, 3, H, W), uint8, as an endless GIF or WebP; of more than 50, evenly chosen ones, both ends among
    them."""
    chosen = torch.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().long()
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames[chosen]]
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": pictures[1:], "duration": FRAME_MS, "loop": 0, "lossless": True}
    pictures[0].save(buffer, kind.upper(), **options)
    return buffer.getvalue()


def curves_of(results: Sequence[Result]) -> bytes:
    """A panel for each reward, the total, the regularizer and the held-out reward over one axis, as PNG: the mean, and
    the band in which four of five samples lie. Shaded: from where the held-out reward no longer follows."""
    first = results[0].history[0]
    held = ["held_out"] if first.held_out is not None else []
    total = ["total"] if len(first.parts) > 1 else []  # of one reward it is the same curve
    names = [*first.parts, *total, *held, "regularizer"]
    made, axes = figures.panels([name.replace("_", " ") for name in names], "iteration")
    for each, name in zip(axes, names, strict=True):
        samples = [result.curve(name, row) for result in results for row in range(len(result.images))]
        figures.draw_samples(each, samples, figures.HELD if name == "held_out" else figures.MAIN)
    partings = [found for result in results if held and (found := result.parting()) is not None]
    if partings:
        figures.shade(axes, min(found.best for found in partings), len(results[0].history) - 1)
    return figures.as_png(made)
