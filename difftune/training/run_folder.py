"""The run of a recipe in a folder: metrics, checkpoints, resumption and signals.

A recipe yields (metrics, state) after each optimiser step and knows nothing of this.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from difftune.configs.written import CONFIG, settings_yaml
from difftune.errors import DiskError, RunError, UserError
from difftune.files import checkpoint, records
from difftune.files.checkpoint import Say, State
from difftune.files.claim import LOCK
from difftune.files.films import stills
from difftune.files.output import sweep, write
from difftune.lookup import guidance_kinds
from difftune.pipelines import full_weights, lora
from difftune.pipelines.shared import claimed_by_main
from difftune.processes import agree_to_stop, process, say_once, stopping
from difftune.training import trackers as log
from difftune.training import validation
from guidance.methods.catalogue import GUIDANCE
from rewards.errors import NotFinite
from rewards.monitor import Parting

METRICS, CARD = "metrics.jsonl", "README.md"
REPORT = "report.html"
Config = Any  # a recipe's dataclass: output_dir, max_train_steps, checkpointing_steps, checkpoints_total_limit, ...
Steps = Iterator[tuple[dict[str, float], State]]

# What may differ between a run and its resumption, which is exact for all else.
FREE = {"max_train_steps", "checkpointing_steps", "checkpoints_total_limit"}
FREE |= {"output_dir", "report_to", "resume_from_checkpoint"}

# What a run without a checkpoint leaves behind: nothing to go on from.
OWN = (CONFIG, METRICS, CARD, REPORT, validation.RECORDS, validation.GRIDS, validation.BEST, log.FOLDER, lora.WEIGHTS)


@contextmanager
def begin_run(config: Config, say: Say | None = None) -> Iterator[State | None]:
    """Around a run: its folder, which no other process may write meanwhile, and the state from which it goes on.

    A folder of a run that had come to no checkpoint is begun anew. What a run leaves that fails before its first one is
    removed. Raises UserError as `starting_state` does, and if the folder cannot be written.
    """
    folder = Path(config.output_dir)
    with claimed_by_main(folder) as claim:
        if claim is not None and checkpoint.checkpoints(folder):
            claim.keep()
        elif claim is not None:
            claim.clear()
        state = starting_state(config, say)
        if claim is not None and state is None:
            claim.note(*OWN)
        try:
            yield state
        except BaseException:
            if claim is not None and checkpoint.checkpoints(folder):
                claim.keep()
            raise


def run_in_folder(
    config: Config,
    steps: Steps,
    state: State | None,
    pipe: Any,
    card: Callable[[dict[str, float]], str],
    reward: Any = None,
) -> dict[str, Any]:
    """Follow a recipe's `steps`, which go on from `state` and train the adapter of `pipe`; returns a summary.

    `config.output_dir` gets metrics.jsonl, config.yaml, checkpoints, pytorch_lora_weights.safetensors and a model card,
    and what `difftune.training.validation` writes. SIGTERM, SIGHUP and Ctrl-C, in any process, save a checkpoint after
    the step that is under way, and end all with 143, 129 and 130. After an error the last whole step is saved.
    reward: what the validations call the trained reward; the one that config names by default.
    """
    folder, main = Path(config.output_dir), process().is_main_process
    trackers = log.trackers(config.report_to, folder, asdict(config)) if main else []
    done = 0 if state is None else state.step
    with checkpoint.going_on():
        metrics: dict[str, float] = {} if state is None else dict(state.info["metrics"])
    started = time.perf_counter()
    rewind_records(config, done)
    validator = validation.open_validator(config, reward)
    keeper = Keeper(folder, pipe, config.checkpoints_total_limit, done, main)
    metrics, state = follow_steps(config, steps, keeper, validator, trackers) or (metrics, state)
    check_stepped(state)
    if main and state is not None:
        checkpoint.prune(folder, config.checkpoints_total_limit, state.step)  # of a run that was resumed at its end
        save_weights(pipe, state, folder)
        write(folder / CARD, card(metrics))
    for tracker in trackers:
        tracker.finish()
    return {
        "output_dir": str(folder),
        "optimizer_steps": config.max_train_steps if state is None else state.step,
        "reward_first": next((r["reward_mean"] for r in records.records(folder / METRICS) if "reward_mean" in r), None),
        "reward_last": metrics.get("reward_mean"),
        **gained(config),
        "seconds": time.perf_counter() - started,
    }


def gained(config: Config) -> dict[str, float]:
    """The first and the last of the validations: rewards on the same prompts and noises, before and after."""
    found = validation.read_validations(config)
    names = {"reward_mean": "validation", "held_out_mean": "held_out"}
    pairs = {name: [r[key] for r in found if key in r] for key, name in names.items()}
    return {f"{name}_{end}": v[i] for name, v in pairs.items() if v for end, i in (("first", 0), ("last", -1))}


def check_stepped(state: State | None) -> None:
    """RunError where every optimiser step was skipped: what would be saved was never trained."""
    if state is not None and state.step and state.info["skipped"] >= state.step:
        raise RunError(
            f"no optimiser step was taken: all {state.step} were skipped, for the reasons above, and the weights are as"
            " they were; look at the model and the reward, then begin in another --output_dir"
        )


def rewind_records(config: Config, done: int) -> None:
    """Write the settings, and drop what records say of later steps than those that are done."""
    folder = Path(config.output_dir)
    process().wait_for_everyone()  # every process has seen the folder as it was
    if process().is_main_process:
        write(folder / CONFIG, settings_yaml(config))
        for place in (folder / validation.BEST, folder / validation.GRIDS):
            sweep(place)
        for name in (METRICS, validation.RECORDS):
            records.rewind(folder / name, done)
    process().wait_for_everyone()  # and sees the records as they go on


def follow_steps(
    config: Config, steps: Steps, keeper: "Keeper", validator: Any, trackers: Sequence[Any]
) -> tuple[dict[str, float], State] | None:
    """The last of the steps, each reported, validated and saved if that is due; None if none was left.

    They end by themselves, by an early stop, or by a signal.
    """
    metrics: dict[str, float] = {}
    bar = tqdm(total=config.max_train_steps, initial=keeper.saved, disable=not keeper.main)
    with stopping() as stop, bar, keeper:
        for metrics, now in steps:
            keeper.state = now
            if validator is not None and now.step == 1:
                validate_start(validator, keeper.pipe, now, trackers)
            if keeper.main:
                report_step(keeper.folder, metrics, trackers, bar)
            last = now.step == config.max_train_steps
            parting = validate_if_due(validator, keeper.pipe, now, trackers, last) if validator else None
            ends = config.early_stop and parting is not None
            asked = agree_to_stop(stop)
            if now.step % config.checkpointing_steps == 0 or last or ends or asked:
                keeper.save()
            if asked:
                process().wait_for_everyone()  # the main one has saved
                stop.leave(now.step)
            if ends:
                say_once(f"stopped at step {now.step}: {parting}")
                break
    return None if keeper.state is None else (metrics, keeper.state)


@dataclass
class Keeper:
    """Saves checkpoints in the main process, each step once, and after an error the last whole step."""

    folder: Path
    pipe: Any
    limit: int | None
    saved: int  # the step that was saved last
    main: bool
    state: State | None = None  # after the last whole step

    def save(self) -> None:
        """Write the checkpoint of the last whole step, unless there is one."""
        if self.main and self.state is not None and self.state.step != self.saved:
            checkpoint.save(self.folder, self.state, self.limit, also=partial(save_weights, self.pipe, self.state))
            self.saved = self.state.step

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and self.state is not None and self.state.step != self.saved:
            with suppress(DiskError):  # which may be what ended the run
                self.save()
                say_once(
                    f"step {self.saved}, the last whole one, is saved: --resume_from_checkpoint latest goes on from it"
                )


def save_weights(pipe: Any, state: State, folder: Path) -> None:
    """Write the weights that `state` trained, or their average if it has one, as diffusers loads them."""
    tensors = {name.partition(".")[2]: t for name, t in state.tensors.items() if name.startswith("weights.")}
    tensors |= {name.partition(".")[2]: t for name, t in state.tensors.items() if name.startswith("ema.")}
    (full_weights if state.info["config"]["full_finetuning"] else lora).save(pipe, folder, tensors)


def validate_if_due(
    validator: validation.Validator, pipe: Any, state: State, trackers: Sequence[Any], last: bool
) -> Parting | None:
    """A validation if one is due, in every process alike; the main one writes it. Returns what `Monitor` finds.

    One whose reward is not finite is skipped.
    """
    config = validator.config
    if state.step % (config.validation_steps or 1) and not last:
        return None
    found = None
    try:
        found = validation.validate(validator, pipe, state)
    except NotFinite as error:
        say_once(f"the validation at step {state.step} is skipped: {error}")
    if found is not None and process().is_main_process:
        validation.write_validation(config, found, partial(save_weights, pipe, state))
        log.show(trackers, "validation", found.record, stills(found.images))
    process().wait_for_everyone()
    return None if found is None else found.parting


def validate_start(validator: validation.Validator, pipe: Any, state: State, trackers: Sequence[Any]) -> None:
    """The validation of step 0: the model that training began with, which is there as long as its LoRA can be switched
    off."""
    if not validator.config.full_finetuning:
        with lora.off(lora.network_of(pipe)):
            validate_if_due(validator, pipe, state._replace(step=0, tensors={}), trackers, last=True)


def starting_state(config: Config, say: Say | None = None) -> State | None:
    """The state of the checkpoint that a run resumes; None for a run that begins at step 0.

    Raises UserError for a folder that holds something, unless it is a run of ours that is resumed with its settings.
    """
    say, folder = say or say_once, Path(config.output_dir)
    held = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if held and CONFIG not in held and not checkpoint.checkpoints(folder):
        raise UserError(f"{folder} holds something else ({held[0]}): choose another --output_dir")
    if held and not config.resume_from_checkpoint:
        raise UserError(
            f"{folder} holds a run: continue it with --resume_from_checkpoint latest, or choose another --output_dir"
        )
    named = None if config.resume_from_checkpoint == "latest" else config.resume_from_checkpoint
    state = checkpoint.resumed(folder, named)  # first, so that a fault of it is told
    process().wait_for_everyone()
    if process().is_main_process and config.resume_from_checkpoint:
        checkpoint.sort_out(folder, say)
    process().wait_for_everyone()  # every process sees the same checkpoints
    if named is None:
        state = checkpoint.resumed(folder, config.resume_from_checkpoint)
    if state is not None:
        same_run(config, state)
        say(f"resuming from step {state.step}")
    elif config.resume_from_checkpoint:
        say(f"{folder} holds no whole checkpoint: starting from step 0")
    return state


@checkpoint.going_on()
def same_run(config: Config, state: State) -> None:
    """UserError, naming the first, if settings are not those that the state was made with."""
    older = asdict(type(config)()) | state.info["config"]  # a setting that is newer than the checkpoint had its default
    older |= earlier_defaults(state)
    then = {**json.loads(json.dumps(older)), "num_processes": state.info["num_processes"]}
    checkpoint.same_settings(asdict(config) | {"num_processes": process().num_processes}, then, FREE)
    if config.max_train_steps < state.step:
        raise UserError(f"the checkpoint is at step {state.step}, beyond max_train_steps={config.max_train_steps}")


def earlier_defaults(state: State) -> dict[str, Any]:
    """Settings that a checkpoint of 0.1 does not hold and whose default was another one: its CFG had scale 5."""
    made = state.info["config"]
    said = made["guidance_scale"] is not None or "scale" in made["guidance_options"] or "model_digest" in state.info
    return {} if said or guidance_kinds(made["guidance"])[-1] is not GUIDANCE["cfg"] else {"guidance_scale": 5.0}


def resolving(config: Config, show: Say | None) -> Say:
    """A function that prints a line and writes it, as a comment, at the head of the run's config.yaml."""
    lines: list[str] = []

    def say(line: str) -> None:
        (show or say_once)(line)
        lines.append(f"# {line}\n")
        if process().is_main_process:
            write(Path(config.output_dir) / CONFIG, "".join(lines) + settings_yaml(config))

    return say


def report_step(folder: Path, metrics: dict[str, float], trackers: Sequence[Any], bar: Any) -> None:
    records.append(folder / METRICS, metrics)
    for tracker in trackers:
        tracker.log(metrics, step=int(metrics["step"]))
    if "reward_mean" in metrics:  # a step that was skipped has none
        bar.set_postfix(reward=f"{metrics['reward_mean']:.4f}", refresh=False)
    bar.update()
