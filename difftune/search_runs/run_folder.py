"""`difftune search`: its folder, saving and resuming. The search itself is `difftune.search_runs.search`.

`state.safetensors` is one file that is replaced as a whole: tensors, and as its metadata the settings, the curve so far
and what the method keeps in JSON. Killed at any time, a search goes on from it to the same result with
`--resume_from_checkpoint latest`; one that has ended goes on with a larger budget.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from difftune import processes
from difftune.configs.fields import with_one_scale
from difftune.configs.search import SearchConfig
from difftune.configs.written import CONFIG, settings_yaml
from difftune.errors import DiskError, RunError, UserError
from difftune.files.checkpoint import Say
from difftune.files.claim import Claim
from difftune.files.output import as_json, png, write
from difftune.files.versions import versions
from difftune.lookup import method_of, reward_named, reward_weights
from difftune.models import check_model
from difftune.pipelines.compiled import check_compile, compiled
from difftune.pipelines.fingerprint import check_resumed, digest_of
from difftune.pipelines.generate import pixels
from difftune.pipelines.opened import open_pipeline
from difftune.pipelines.shared import claimed_by_main, made_by_main
from difftune.reports.sheets import Cell, sheet
from difftune.search_runs.experts import experts_for
from difftune.search_runs.flags import experts_of, method_settings_of
from difftune.search_runs.lineage_plot import picture, shown_leaves
from difftune.search_runs.search import GRADIENTS, Found, Point, Search, decode_each, method_config, search
from guidance.search.problem import Graph, Saved
from rewards.compose import scaled_sum
from rewards.registry import Reward

STATE, RESULT = "state.safetensors", "search.json"
SAVE_SECONDS = 5.0  # between two savings
DRAWN = 8  # prompts whose lineage is drawn
THUMBNAILS = 8  # of finished samples below it
FREE = {"output_dir", "resume_from_checkpoint"}  # what may differ between a search and its resumption
FORMER = {"budget": "nfe_budget"}  # names of settings in files of earlier versions
BUDGETS = {"nfe_budget", "reward_budget"}  # what may grow


def search_in_folder(
    config: SearchConfig, show: Say | None = None, pipe: Any = None, reward: Reward | None = None
) -> dict[str, Any]:
    """Search, and write images, weights, the lineage and search.json; returns what search.json holds.

    SIGTERM and Ctrl-C save the state after the step that is under way, and end with 143 and 130.
    """
    check_search(config, reward)
    say, began = show or processes.say_once, time.perf_counter()
    with claimed_by_main(config.output_dir) as claim:
        done, earlier = made_by_main(lambda: held_before(claim, config))
        if done is not None:
            say(f"{config.output_dir} was finished: nothing remains to do")
            return done
        going = begin_search(config, earlier, pipe, reward)
        dynamic = False if config.method in GRADIENTS else None  # the way back recomputes the decoder
        with compiled(going.pipe, config.compile, dynamic, method_of(config), going.others) as blocks:
            if blocks is not None:
                say(f"compile: {blocks}")
            found = follow_search(going, config)
        summary = {**search_summary(config, found), "seconds": round(time.perf_counter() - began, 3)}
        summary["versions"] = versions()
        if claim is not None:
            claim.results([*search_files(config, found), (CONFIG, settings_yaml(config)), (RESULT, as_json(summary))])
            claim.end()
    return summary


def held_before(claim: Claim | None, config: SearchConfig) -> "tuple[dict[str, Any] | None, Earlier | None]":
    """The summary of a search that had ended, or else the one that was saved, as the main process finds them."""
    assert claim is not None
    if claim.ended and config.resume_from_checkpoint:
        return json.loads((claim.path / RESULT).read_text("utf-8")), None
    claim.clear()
    return None, read_earlier(claim, config)


def check_search(config: SearchConfig, reward: Reward | None = None) -> None:
    """UserError for the first invalid setting, before anything is loaded."""
    if not config.prompt:
        raise UserError("there is no prompt to search for: give at least one --prompt")
    settings = method_config(config.method, method_settings_of(config))
    experts_for(config.method, settings, experts_of(config))
    method_of(config)
    reward_weights(config.reward if reward is None else reward, gradient=config.method in GRADIENTS)
    check_compile(config)
    check_model(config.model)


def begin_search(config: SearchConfig, earlier: "Earlier | None", pipe: Any, reward: Reward | None) -> Search:
    """The search, from its beginning or from where it was saved."""
    named = reward_named(config.reward if reward is None else reward, gradient=config.method in GRADIENTS)
    reward = scaled_sum(named, config.reward_scaling)
    going = search(
        open_pipeline(config.model, config.lora) if pipe is None else pipe,
        config.prompt,
        config.method,
        reward,
        config.nfe_budget,
        config.seed,
        guidance=method_of(config),
        experts=experts_of(config),
        num_inference_steps=config.num_inference_steps,
        eta=config.eta,
        embedded_guidance=config.embedded_guidance,
        reward_budget=config.reward_budget,
        memory_budget=config.memory_budget,
        decode_batch=config.decode_batch,
        enable_vae_tiling=config.enable_vae_tiling,
        progress=processes.process().is_main_process,
        saved=None if earlier is None else earlier.saved,
        shared=True,
        **method_settings_of(config),
    )
    if earlier is not None:
        check_resumed(going.pipe, earlier.model)
        going.history = earlier.history
    return going


def follow_search(going: Search, config: SearchConfig) -> Found:
    """The end of a search whose state is saved every few seconds, at its end, and after an error.

    A signal to any process ends all of them, after the same step.
    """
    found, keeper = None, Keeper(config, Path(config.output_dir, STATE), digest_of(going.pipe))
    with processes.stopping() as stop:
        try:
            for number, found in enumerate(going):
                keeper.see(found)
                asked = processes.agree_to_stop(stop)
                if asked or time.perf_counter() - keeper.saved > SAVE_SECONDS:
                    keeper.save(found)
                if asked:
                    processes.process().wait_for_everyone()  # the main one has saved
                    stop.leave(number + 1)
        except Exception:
            keeper.rescue()
            raise
    found = going.run() if found is None else found
    keeper.save(found)
    return found


class Keeper:
    """Saves where a search stands, in the main process.

    A tree changes in place, so that a step which fails spoils it: what is saved after an error was taken before that
    step, or before an earlier one if taking it costs more than a twentieth of the time.
    """

    def __init__(self, config: SearchConfig, file: Path, model: str | None):
        self.config, self.file, self.model = config, file, model
        self.saved = self.taken = time.perf_counter()
        self.cost, self.data = 0.0, b""
        self.main = processes.process().is_main_process

    def see(self, found: Found) -> None:
        """Take the state between two steps."""
        began = time.perf_counter()
        if self.main and began - self.taken >= 20 * self.cost:
            self.data = state_bytes(self.config, found, self.model)
            self.taken = time.perf_counter()
            self.cost = self.taken - began

    def save(self, found: Found) -> None:
        """Write the state, which no step has changed since."""
        if self.main:
            self.data = state_bytes(self.config, found, self.model)
            write(self.file, self.data)
        self.saved = time.perf_counter()

    def rescue(self) -> None:
        """After an error, write the state that was taken last; the error may be a full disk."""
        with suppress(DiskError):
            if self.data:
                write(self.file, self.data)


# ------------------------------------------------------------------------------------------------ the state on disk


class Earlier:
    """A search that was saved."""

    def __init__(self, saved: Saved, history: Sequence[Point], model: str | None = None):
        self.saved, self.history, self.model = saved, tuple(history), model


def state_bytes(config: SearchConfig, found: Found, model: str | None) -> bytes:
    tensors, info = found.state.saved()
    about = {"settings": comparable(config), "history": found.history, "info": info, "model_digest": model}
    return save(dict(tensors), {"difftune": json.dumps(about)})


def comparable(config: SearchConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def read_earlier(claim: Claim, config: SearchConfig) -> Earlier | None:
    """The search that the folder's state holds; None if there is none yet."""
    folder, held = claim.path, claim.held()
    if STATE in held and not config.resume_from_checkpoint:
        raise UserError(
            f"{folder} holds a search: go on with it by --resume_from_checkpoint latest, or choose another --output_dir"
        )
    if held and STATE not in held:
        raise UserError(f"{folder} holds another run ({held[0]}): nothing was written, choose another --output_dir")
    if not held:
        return None
    now = json.loads(json.dumps(comparable(config)))
    if finished(folder / RESULT) == now:
        raise UserError(
            f"{folder} holds a finished search: there is nothing to resume, give a larger --nfe_budget or another "
            "--output_dir"
        )
    earlier, before = read_state(folder / STATE)
    for name, value in now.items():
        same_or_larger(folder, name, before[name], value)
    return earlier


def finished(result: Path) -> dict[str, Any] | None:
    """The settings of a search that has come to its end; None without a whole search.json, which is written anew."""
    try:
        return settings_in(json.loads(result.read_text("utf-8")))
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError):
        return None


def settings_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a state or a search.json was written with, by the names of today; the default for one that did
    not exist yet."""
    before = with_one_scale({FORMER.get(name, name): value for name, value in about["settings"].items()})
    return {name: before.get(name, default) for name, default in comparable(SearchConfig()).items()}


def same_or_larger(folder: Path, name: str, before: Any, now: Any) -> None:
    """Raises UserError for a setting that changed, except a budget that grew; None is no limit."""
    if before == now or (name in BUDGETS and before is not None and (now is None or now > before)):
        return
    more = " or more" if name in BUDGETS else ""
    raise UserError(f"the search in {folder} was made with {name}={before!r}, not {now!r}: resume with that{more}")


def read_state(path: Path) -> tuple[Earlier, dict[str, Any]]:
    """A search that was saved, and its settings. Raises RunError for a file that is damaged or edited."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["difftune"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        history = [Point(*point) for point in about["history"]]
        return Earlier(Saved(tensors, about["info"]), history, about.get("model_digest")), settings_in(about)
    except (SafetensorError, OSError, RecursionError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunError(f"{path} cannot be resumed from ({why}): remove it to start anew") from error


# ------------------------------------------------------------------------------------------------ results


def search_summary(config: SearchConfig, found: Found) -> dict[str, Any]:
    """The contents of search.json: the settings, each prompt's best, and the curve."""
    state = found.state
    prompts = [
        {
            "prompt": prompt,
            "seed": config.seed + i,
            "image": image_name(config, i),
            "reward": float(state.reward[i]),
            "nfe": int(state.nfe[i]),
            "reward_calls": int(state.reward_calls[i]),
            "gradients": int(state.gradients[i]),
        }
        for i, prompt in enumerate(config.prompt)
    ]
    finite = [point for point in found.history if all(r > float("-inf") for r in point.reward)]
    return {
        "settings": comparable(config),
        "reward": float(state.reward.mean()),
        "nfe": float(state.nfe.double().mean()),
        "reward_calls": float(state.reward_calls.double().mean()),
        "prompts": prompts,
        "history": [point._asdict() for point in finite],
    }


def image_name(config: SearchConfig, i: int) -> str:
    return f"{i:05d}-seed{config.seed + i}.png"


def search_files(config: SearchConfig, found: Found) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures and of the weighted samples."""
    pictures = pixels(found.images)
    for i, image in enumerate(pictures):
        yield image_name(config, i), png(image)
    rewards = [f"reward {float(reward):.3g}" for reward in found.rewards]
    rows = zip(config.prompt, pictures, rewards, strict=True)
    yield "grid.png", sheet((prompt, [Cell([image], reward)]) for prompt, image, reward in rows)
    graph = found.state.graph()
    for i in range(min(len(config.prompt), DRAWN)):
        yield f"{i:05d}-lineage.png", picture(graph, i, thumbnails(found, graph, i))
    weighted = found.state.weighted()
    samples = {name: value.cpu().contiguous() for name, value in weighted._asdict().items()}
    yield "samples.safetensors", save({**samples, "best": found.latents.cpu().contiguous()})


def thumbnails(found: Found, graph: Graph, group: int) -> dict[int, Any]:
    """Pictures of some finished samples of a prompt by their nodes: none if nodes and samples cannot be paired."""
    weighted = found.state.weighted()
    own = weighted.groups == group
    finished = (graph.groups == group) & (graph.level == graph.level[graph.groups == group].max())
    values = graph.value[finished & ~graph.value.isnan()]
    if len(values) != int(own.sum()) or not torch.allclose(values.double(), weighted.reward[own].double().cpu()):
        return {}
    shown = shown_leaves(graph, group, THUMBNAILS)
    images = decode_each(found.decode, weighted.x0[own][list(shown.values())])
    return dict(zip(shown, pixels(images), strict=True))
