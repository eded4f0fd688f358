"""One training by TRL, or one trial of what it can do, in the environment that `bench_peers.py` makes for it.

    python scripts/peer_trl.py JOB.json RESULT.json

The job names its `kind`, a function of KINDS, and what that is told; the result is a JSON object. Nothing of difftune's
recipes is imported, only the reward, so that both libraries follow the same one.
"""

import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip  # noqa: F401, it makes transformers' module anew
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, UNet2DConditionModel
from forwards import Forwards, counted
from transformers import CLIPModel
from trl import (
    AlignPropConfig,
    AlignPropTrainer,
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)

assert CLIPModel  # what is imported of transformers is there for good
vars(sys.modules["transformers"])["PreTrainedConfig"] = sys.modules[
    "transformers"
].PretrainedConfig  # as version 5 has it
from rewards.registry import load  # noqa: E402

Job = dict[str, Any]
KINDS_OF = {"alignprop": (AlignPropConfig, AlignPropTrainer), "ddpo": (DDPOConfig, DDPOTrainer)}
PLAIN = {"mixed_precision": "no", "allow_tf32": False}  # a CPU has neither


class Scores:
    """The reward as TRL calls it, and the mean of each call."""

    def __init__(self, name: str):
        self.reward, self.means = load(name), []

    def __call__(self, images: torch.Tensor, prompts: tuple[str], metadata: Any) -> tuple[torch.Tensor, dict]:
        found = self.reward(images.float(), list(prompts))
        self.means.append(float(found.detach().mean()))
        return found, {}


def trainer_of(job: Job, scores: Scores, **options: Any) -> Any:
    """TRL's trainer of the job's recipe with the job's options."""
    config, trainer = KINDS_OF[job["recipe"]]
    pipeline = DefaultDDPOStableDiffusionPipeline(job["model"], use_lora=True)
    pipeline.set_progress_bar_config(disable=True)
    draw, prompts = random.Random(job["seed"]), job["prompts"]
    project = {"logging_dir": job["folder"], "project_dir": job["folder"], "automatic_checkpoint_naming": True}
    settings = config(seed=job["seed"], project_kwargs=project, **PLAIN, **job["options"] | options)
    made = trainer(settings, scores, lambda: (draw.choice(prompts), {}), pipeline)
    made.sd_pipeline.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def predictions(trainer: Any) -> torch.Tensor:
    """What the network says of one noisy latent: it changes if, and only if, the training reaches it."""
    unet, draw = trainer.sd_pipeline.unet, torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    x = torch.randn(1, unet.config.in_channels, size, size, generator=draw)
    states = torch.randn(1, 8, unet.config.cross_attention_dim, generator=draw)
    was, _ = unet.training, unet.eval()
    found = unet(x, 500, states).sample
    unet.train(was)
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------ kinds of jobs


def train(job: Job) -> dict[str, Any]:
    """Train for the job's seconds; the LoRA is saved at even shares of them, for others to judge."""
    scores = Scores(job["reward"])
    trainer, seconds, epoch, points, curve = trainer_of(job, scores, save_freq=1_000_000), 0.0, 0, [], []
    with counted(Forwards()) as spent:
        while seconds < job["seconds"] and epoch < job["updates"]:
            began, seen = time.process_time(), len(scores.means)
            trainer.step(epoch, epoch)
            seconds, epoch = seconds + time.process_time() - began, epoch + 1
            curve.append([spent.total, sum(scores.means[seen:]) / len(scores.means[seen:])])
            if seconds >= job["seconds"] * (len(points) + 1) / job["points"] or epoch == job["updates"]:
                folder = Path(job["folder"]) / f"point-{len(points)}"
                trainer.sd_pipeline.save_checkpoint([trainer.sd_pipeline.unet], None, str(folder))
                cost = {"seconds": seconds, "forward_equivalents": spent.total}
                points.append({"step": epoch, "folder": str(folder), **cost})
    return {"points": points, "curve": curve}


def resume(job: Job) -> dict[str, Any]:
    """Train three epochs, of which two are saved, go on from the newest in a new trainer, and see what changes."""
    first = trainer_of(job, Scores(job["reward"]), save_freq=1)
    begun = predictions(first)
    for epoch in range(3):
        first.step(epoch, epoch)
    second = trainer_of(job, Scores(job["reward"]), resume_from=str(Path(job["folder"]) / "checkpoints"))
    read = predictions(second)
    second.step(second.first_epoch, second.first_epoch)
    return {
        "three_epochs": distance(predictions(first), begun),
        "read_from_saved": distance(read, predictions(first)),
        "epoch_after_resuming": distance(predictions(second), read),
    }


def guidance(job: Job) -> dict[str, Any]:
    """An epoch without guidance: TRL's scale of 1, at which it makes no second branch."""
    return epochs(job, 1, sample_guidance_scale=1.0)


def defaults(job: Job) -> dict[str, Any]:
    """Ten epochs with TRL's own settings, but for ten sampler steps: which of them carry gradient is drawn anew."""
    return epochs(job | {"options": {"sample_num_steps": 10}}, 10)


def epochs(job: Job, count: int, **options: Any) -> dict[str, Any]:
    trainer = trainer_of(job, Scores(job["reward"]), save_freq=1_000_000, **options)
    begun = predictions(trainer)
    for epoch in range(count):
        trainer.step(epoch, epoch)
    return {"moved": distance(predictions(trainer), begun)}


def encode(job: Job) -> dict[str, Any]:
    """What the text encoder says of the prompts under this transformers: the states of each, as one list."""
    pipe = DefaultDDPOStableDiffusionPipeline(job["model"], use_lora=False).sd_pipeline
    assert isinstance(pipe.unet, UNet2DConditionModel) and isinstance(pipe.scheduler, DDIMScheduler)
    length = pipe.tokenizer.model_max_length
    given = pipe.tokenizer(
        job["prompts"], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = pipe.text_encoder(given.input_ids)[0]
    return {"ids": given.input_ids.tolist(), "states": states.tolist()}


KINDS = {kind.__name__: kind for kind in (train, resume, guidance, defaults, encode)}


def main(given: str, target: str) -> None:
    """Do the job; what a trial raises is its result."""
    job = json.loads(Path(given).read_text())
    torch.set_num_threads(job["threads"])
    PartialState(cpu=True)  # without it TRL's warning that a model has no LoRA is an error
    try:
        found = KINDS[job["kind"]](job)
    except Exception as error:
        if job["kind"] in ("train", "encode"):
            raise
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    known = {name: version(name) for name in ("trl", "transformers", "diffusers", "accelerate", "peft", "torch")}
    Path(target).write_text(json.dumps({"found": found, "versions": known}))


if __name__ == "__main__":
    main(*sys.argv[1:])
