"""What surrounds a recipe on the command line: its folder, metrics, checkpoints, resumption and signals.

A recipe yields (metrics, state) after each optimiser step and knows nothing of this.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from difftune.errors import UserError
from difftune.files import checkpoint, records
from difftune.files.checkpoint import Say, State
from difftune.files.output import sweep, write
from difftune.pipelines import full_weights, lora
from difftune.processes import agreed, process, shown, stopping
from difftune.training import trackers as log
from difftune.training import validation
from rewards.errors import NotFinite
from rewards.monitor import Parting

CONFIG, METRICS, CARD = "config.yaml", "metrics.jsonl", "README.md"
Config = Any  # a recipe's dataclass: output_dir, max_train_steps, checkpointing_steps, checkpoints_total_limit, ...
Steps = Iterator[tuple[dict[str, float], State]]

# What may differ between a run and its resumption, which is exact for all else.
FREE = {"max_train_steps", "checkpointing_steps", "checkpoints_total_limit"}
FREE |= {"output_dir", "report_to", "resume_from_checkpoint"}


def run(
    config: Config,
    steps: Steps,
    state: State | None,
    pipe: Any,
    card: Callable[[dict[str, float]], str],
    reward: Any = None,
) -> dict[str, Any]:
    """Follow a recipe's `steps`, which go on from `state` and train the adapter of `pipe`; returns a summary.

    `config.output_dir` gets metrics.jsonl, config.yaml, checkpoints, pytorch_lora_weights.safetensors and a model card,
    and what `difftune.training.validation` writes. SIGTERM and Ctrl-C, in any process, save a checkpoint after the step
    that is under way, and end all with 143 and 130. reward: what the validations call the trained reward; the one that
    config names by default.
    """
    folder, main = Path(config.output_dir), process().is_main_process
    trackers = log.trackers(config.report_to, folder, asdict(config)) if main else []
    done = 0 if state is None else state.step
    first: dict[str, float] = {}
    metrics: dict[str, float] = {} if state is None else dict(state.info["metrics"])
    started = time.perf_counter()
    process().wait_for_everyone()  # every process has seen the folder as it was
    if main:
        write(folder / CONFIG, settings_yaml(config))
        for place in (folder, folder / validation.BEST, folder / validation.GRIDS):
            sweep(place)
        for name in (METRICS, validation.RECORDS):
            records.rewind(folder / name, done)
    process().wait_for_everyone()  # and sees the records as they go on
    scorers = validation.scorers(config, reward) if config.validation_steps else {}
    bar = tqdm(total=config.max_train_steps, initial=done, disable=not main)
    with stopping() as stop, bar:
        for metrics, now in steps:
            state, first = now, first or metrics
            if main:
                report(folder, metrics, trackers, bar)
            last = now.step == config.max_train_steps
            parting = validated(config, pipe, now, scorers, trackers, last) if scorers else None
            ends = config.early_stop and parting is not None
            due = now.step % config.checkpointing_steps == 0 or last or ends
            asked = agreed(stop)
            if main and (due or asked):
                limit = config.checkpoints_total_limit
                checkpoint.save(folder, now, limit, also=partial(save_weights, pipe, now))
            if asked:
                process().wait_for_everyone()  # the main one has saved
                stop.leave(now.step)
            if ends:
                shown(f"stopped at step {now.step}: {parting}")
                break
    if main and state is not None:
        save_weights(pipe, state, folder)
        write(folder / CARD, card(metrics))
    for tracker in trackers:
        tracker.finish()
    return {
        "output_dir": str(folder),
        "optimizer_steps": config.max_train_steps if state is None else state.step,
        "reward_first": first.get("reward_mean"),
        "reward_last": metrics.get("reward_mean"),
        "seconds": time.perf_counter() - started,
    }


def save_weights(pipe: Any, state: State, folder: Path) -> None:
    """Write the weights that `state` trained, or their average where it has one, as diffusers loads them."""
    tensors = {name.partition(".")[2]: t for name, t in state.tensors.items() if name.startswith("weights.")}
    tensors |= {name.partition(".")[2]: t for name, t in state.tensors.items() if name.startswith("ema.")}
    (full_weights if state.info["config"]["full_finetuning"] else lora).save(pipe, folder, tensors)


def validated(
    config: Config, pipe: Any, state: State, scorers: Mapping[str, Any], trackers: Sequence[Any], last: bool
) -> Parting | None:
    """A validation where one is due, in every process alike; the main one writes it. Returns what `Monitor` finds.

    One whose reward is not finite is skipped.
    """
    if state.step % config.validation_steps and not last:
        return None
    found = None
    try:
        found = validation.validate(config, pipe, state, scorers)
    except NotFinite as error:
        shown(f"the validation at step {state.step} is skipped: {error}")
    if found is not None and process().is_main_process:
        validation.keep(config, found, partial(save_weights, pipe, state))
        log.show(trackers, "validation", found.record, found.images)
    process().wait_for_everyone()
    return None if found is None else found.parting


def starting_state(config: Config, say: Say | None = None) -> State | None:
    """Where a run begins: None at step 0, else the state of the checkpoint that is to be resumed.

    Raises UserError for a folder that holds something, unless it is a run of ours that is resumed with its settings.
    """
    say, folder = say or shown, Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output_dir")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if held and CONFIG not in held and not checkpoint.checkpoints(folder):
        raise UserError(f"{folder} holds something else ({held[0]}): choose another --output_dir")
    if held and not config.resume_from_checkpoint:
        raise UserError(
            f"{folder} holds a run: continue it with --resume_from_checkpoint latest, or choose another --output_dir"
        )
    state = checkpoint.resumed(folder, config.resume_from_checkpoint, say)
    if state is not None:
        same_run(config, state)
        say(f"resuming from step {state.step}")
    elif config.resume_from_checkpoint:
        say(f"{folder} holds no whole checkpoint: starting from step 0")
    return state


def same_run(config: Config, state: State) -> None:
    """UserError, naming the first, where settings are not those that the state was made with."""
    now = asdict(config) | {"num_processes": process().num_processes}
    older = asdict(type(config)()) | state.info["config"]  # a setting that is newer than the checkpoint had its default
    then = {**older, "num_processes": state.info["num_processes"]}
    for name, value in now.items():
        if name not in FREE and then.get(name) != value:
            raise UserError(f"the checkpoint was made with {name}={then.get(name)!r}, not {value!r}: resume with that")
    if config.max_train_steps < state.step:
        raise UserError(f"the checkpoint is at step {state.step}, beyond max_train_steps={config.max_train_steps}")


def resolving(config: Config, show: Say | None) -> Say:
    """What says a line to people and writes it, as a comment, at the head of the run's config.yaml."""
    lines: list[str] = []

    def say(line: str) -> None:
        (show or shown)(line)
        lines.append(f"# {line}\n")
        if process().is_main_process:
            write(Path(config.output_dir) / CONFIG, "".join(lines) + settings_yaml(config))

    return say


def settings_yaml(config: Config) -> str:
    """The settings with the keys of the flags, as `--config` reads them."""
    settings = asdict(config)
    del settings["resume_from_checkpoint"]
    settings |= {f"guidance.{key}": value for key, value in settings.pop("guidance_options").items()}
    return yaml.safe_dump({key: value for key, value in settings.items() if value is not None}, sort_keys=False)


def report(folder: Path, metrics: dict[str, float], trackers: Sequence[Any], bar: Any) -> None:
    records.append(folder / METRICS, metrics)
    for tracker in trackers:
        tracker.log(metrics, step=int(metrics["step"]))
    if "reward_mean" in metrics:  # a step that was skipped has none
        bar.set_postfix(reward=f"{metrics['reward_mean']:.4f}", refresh=False)
    bar.update()
