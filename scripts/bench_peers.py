"""AlignProp and DDPO of TRL 0.23.1, the last release that has them, beside ours: the same reward, model and time.

    python scripts/bench_peers.py [--seconds 240] [--seeds 0] [--runs "trl alignprop" ...] [--quick] [--folder FOLDER]

TRL gets an environment of its own, runs/trl, made by `python -m venv` and pip. Every run trains `tiny` on
`tiny-clip` for as many seconds as every other, on one thread, with ten sampler steps; what it has trained is judged at
even shares of that time by `bench_recipes.py`: held-out prompts, the same noises before and after, the oracle held out.
Forward-equivalents are counted in both libraries by the same hooks.

Then each library is asked for three things: to go on from a checkpoint, to train without guidance, and to train by its
defaults at ten sampler steps. What it answers is told as it is. Every run and every trial is a line of
FOLDER/results.jsonl, and one that is there is not run again.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import bench_recipes
import numpy as np
from bench_recipes import Job
from benching import Store, hardware, table
from safetensors.torch import load_file

from difftune import models
from difftune.files.output import write
from difftune.files.prompts import prompts_named
from difftune.recipes import RECIPES, train, train_in_folder

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "runs/trl"
PACKAGES = ("trl==0.23.1", "transformers==4.57.*", "diffusers==0.35.*", "peft<0.18", "open_clip_torch>=3.3", "timm")
PACKAGES += ("accelerate", "datasets", "torch", "torchvision")
SCALE, STEPS, REWARD = 3.0, 10, "tiny-clip"
SAMPLED = {"sample_num_steps": STEPS, "sample_guidance_scale": SCALE}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {  # the recipe, and what differs from TRL's defaults
    "trl alignprop": (
        "alignprop",
        {**SAMPLED, "sample_eta": 0.0, "train_batch_size": 8, "truncated_rand_backprop_minmax": [0, STEPS]},
    ),
    "trl ddpo": (
        "ddpo",
        {**SAMPLED, "sample_batch_size": 32, "sample_num_batches_per_epoch": 1, "train_batch_size": 32},
    ),
}
GUIDED = ("--guidance", "cfg", "--guidance_scale", str(SCALE))
OURS: dict[str, tuple[str, tuple[str, ...]]] = {  # the recipe, and what differs from difftune/examples/tiny-RECIPE.yaml
    "difftune alignprop": ("alignprop", GUIDED),
    "difftune ddpo": ("ddpo", (*GUIDED, "--learning_rate", "3e-4")),
    "difftune alignprop, no guidance": ("alignprop", ()),
    "difftune drtune, no guidance": ("drtune", ()),
}
TRIALS = {
    "resume": "goes on from a checkpoint",
    "guidance": "trains without guidance",
    "defaults": "trains ten epochs by its defaults at ten sampler steps",
}
TRIED = ("alignprop", "ddpo")  # the recipes of the trials


# ------------------------------------------------------------------------------------------------ TRL's environment


def python_in(folder: Path) -> Path:
    """The python of TRL's environment, which is made the first time: minutes, and gigabytes for torch."""
    python, done = folder / "bin/python", folder / "installed.json"
    if not done.is_file() or json.loads(done.read_text()) != list(PACKAGES):
        print(f"installing {', '.join(PACKAGES)} into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        write(done, json.dumps(PACKAGES))
    return python


def asked(python: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """What `peer_trl.py` answers to a job. SystemExit, with the end of what it printed, if it fails."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    given, answer = folder / f"{job['kind']}-job.json", folder / f"{job['kind']}.json"
    given.write_text(json.dumps(job))
    answer.unlink(missing_ok=True)
    command = [python, ROOT / "scripts/peer_trl.py", given, answer]
    setting = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=setting, capture_output=True, text=True, check=False)
    if done.returncode or not answer.is_file():
        raise SystemExit(f"{job['kind']} failed in TRL's environment:\n{done.stderr[-3000:]}")
    return json.loads(answer.read_text())


def peer_job(kind: str, recipe: str, folder: Path, options: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    prompts = prompts_named("shapes", seed)
    job = {"kind": kind, "recipe": recipe, "folder": str(folder.resolve()), "options": dict(options), "seed": seed}
    return job | {
        "model": str(models.path("tiny")),
        "reward": REWARD,
        "threads": 1,
        "prompts": [prompts(i) for i in range(2000)],
    }


# ------------------------------------------------------------------------------------------------ training


def sizes_of(given: argparse.Namespace) -> dict[str, Any]:
    """How much of a run is judged."""
    return {"per_category": 1, "images": 2, "points": 1} if given.quick else {"per_category": 10, "points": 4}


def train_peer(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """A run of TRL, judged."""
    recipe, options = PEERS[name]
    folder = folder_of(name, seed, given)
    sizes = sizes_of(given)
    job = peer_job("train", recipe, folder, options, seed)
    job |= {"seconds": given.seconds, "points": sizes["points"], "updates": 2 if given.quick else 1_000_000}
    answer = asked(python_in(ENVIRONMENT), job)
    settings = {"model": "tiny", "guidance": "cfg", "guidance_scale": SCALE, "num_inference_steps": STEPS}
    settings["reward"] = [REWARD]
    judge = Job(recipe, seed, folder, **sizes)
    then, points = bench_recipes.before(judge, settings), []
    for point in answer["found"]["points"]:
        now = bench_recipes.measured(judge, settings, Path(point["folder"]))
        points.append(point | bench_recipes.compared(judge, now, then))
    return {"points": points, "curve": answer["found"]["curve"], "versions": answer["versions"], "on": hardware()}


def train_ours(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """A run of difftune, judged."""
    recipe, flags = OURS[name]
    folder, results = folder_of(name, seed, given), given.folder / "ours.jsonl"
    steps = 2 if given.quick else 1_000_000
    flags = (*flags, "--reward", REWARD, "--max_train_steps", str(steps), "--checkpointing_steps", "2")
    job = Job(recipe, seed, folder, flags, given.seconds, **sizes_of(given))
    bench_recipes.follow(job, results)
    return {**Store(results).read()[folder.name], "on": hardware()}


def folder_of(name: str, seed: int, given: argparse.Namespace) -> Path:
    return given.folder / f"{file_name(name)}-{seed}"


def file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


# ------------------------------------------------------------------------------------------------ trials


def try_peer(trial: str, recipe: str, given: argparse.Namespace) -> dict[str, Any]:
    options = next(options for known, options in PEERS.values() if known == recipe)
    job = peer_job(trial, recipe, given.folder / f"trl-{recipe}-{trial}", options)
    return asked(python_in(ENVIRONMENT), job)["found"]


def try_ours(trial: str, recipe: str, given: argparse.Namespace) -> dict[str, Any]:
    """The same of AlignProp and DDPO here; what is raised is not told, but raised."""
    folder = given.folder / f"difftune-{recipe}-{trial}"
    shutil.rmtree(folder, ignore_errors=True)
    config = partial(RECIPES[recipe].config, num_inference_steps=STEPS)
    if trial != "resume":
        settings = {"guidance": "none", "max_train_steps": 1} if trial == "guidance" else {"max_train_steps": 10}
        return {"moved": min(metrics["grad_norm"] for metrics, _ in train(config(**settings)))}
    train_in_folder(config(max_train_steps=3, output_dir=str(folder / "whole")))
    parts = partial(config, output_dir=str(folder / "parts"), checkpointing_steps=1)
    train_in_folder(parts(max_train_steps=2))
    saved = weights_in(folder / "parts")
    train_in_folder(parts(max_train_steps=3, resume_from_checkpoint="latest"))
    now = weights_in(folder / "parts")
    moved, apart = distance(now, saved), distance(now, weights_in(folder / "whole"))
    return {"epoch_after_resuming": moved, "from_uninterrupted": apart}


def weights_in(folder: Path) -> dict[str, Any]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The largest difference of two LoRAs."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def answer(found: Mapping[str, Any]) -> str:
    """A trial's result in words."""
    if "error" in found:
        return f"no: {found['error'].replace('|', '/')}"
    if "moved" in found:
        return "yes" if found["moved"] > 0 else "no: nothing changes"
    if found["epoch_after_resuming"] == 0:
        return "no: the epoch after it changes nothing"
    if found.get("from_uninterrupted") == 0:
        return "yes, to the bit"
    return "yes" if found.get("read_from_saved", 0) == 0 else "not where it was: it reads other weights"


# ------------------------------------------------------------------------------------------------ tables


def told(runs: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """A row for each point of each run, mean over seeds."""
    rows = []
    for name, lines in runs.items():
        for points in zip(*(line["points"] for line in lines), strict=False):
            mean = {key: np.mean([p[key] for p in points], axis=0) for key in points[0] if key != "folder"}
            cost = [f"{mean['seconds']:.0f}", f"{mean['forward_equivalents']:.0f}", f"{mean['step']:.0f}"]
            rows.append([name, *cost, *(bench_recipes.change(mean, judge, 3) for judge in ("reward", "oracle"))])
    columns = ["run", "seconds", "forward-equivalents", "updates", f"{REWARD}, held out", "oracle, held out"]
    return table(columns, rows)


def told_trials(found: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """A row for each library and recipe, a column for each trial."""
    pairs = dict.fromkeys((library, recipe) for library, recipe, _ in found)
    rows = [[f"{of} {recipe}", *(answer(found[of, recipe, trial]) for trial in TRIALS)] for of, recipe in pairs]
    return table(["", *TRIALS.values()], rows)


def main(given: argparse.Namespace) -> None:
    store = Store(given.folder / "results.jsonl")
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for name in given.runs:
        measure = train_peer if name in PEERS else train_ours
        keys = {seed: json.dumps([name, seed, given.seconds, given.quick]) for seed in given.seeds}
        runs[name] = [store.measured(key, partial(measure, name, seed, given)) for seed, key in keys.items()]
    trials = {}
    for library, attempt in {"trl": try_peer, "difftune": try_ours}.items():
        for recipe, trial in itertools.product(TRIED, TRIALS):
            key = json.dumps([library, recipe, trial])
            trials[library, recipe, trial] = store.measured(key, partial(attempt, trial, recipe, given))
    text = f"{told(runs)}\n\n{told_trials(trials)}\n"
    write(given.folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="*", default=[*PEERS, *OURS], choices=[*PEERS, *OURS])
    parser.add_argument("--quick", action="store_true", help="two updates of each: whether it works")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_peers"))
    main(parser.parse_args())
