"""Images per second and peak memory of rewards at their real size, with random weights where theirs are downloaded.

    python scripts/bench_rewards.py [REWARD ...] [--batch 2] [--side 512] [--repeats 2]

Each reward runs in a process of its own, so that the peak is its own: forward alone, then forward and backward to the
pixels. What does not fit into the memory of the machine is said so.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benching import hardware
from open_clip import SimpleTokenizer
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel
from transformers import CLIPVisionModelWithProjection as CLIPVision
from transformers.initialization import no_init_weights

from rewards.learned import imagereward
from rewards.learned.aesthetic import Aesthetic
from rewards.learned.clip import VIT_H, VIT_L, TransformersCLIP, vision_config
from rewards.learned.preprocess import Preprocess
from rewards.registry import Reward, load


def random(kind: type, config: Any, **options: bool) -> Any:
    """A network of that size with small random weights, frozen."""
    with no_init_weights():
        model = kind(config, **options)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.uniform_(-0.02, 0.02)
        else:  # norms keep the signal's size: small ones make denormal gradients, which are very slow
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval().requires_grad_(False)


def clip(sizes: dict[str, Any], fit: str = "crop") -> TransformersCLIP:
    return TransformersCLIP(random(CLIPModel, CLIPConfig(**sizes)), SimpleTokenizer(), Preprocess(fit=fit))


def aesthetic() -> Aesthetic:
    reward = Aesthetic.__new__(Aesthetic)
    reward.model, reward.preprocess = random(CLIPVision, vision_config(VIT_L)), Preprocess()
    reward.weight, reward.bias = torch.randn(768), torch.zeros(())
    return reward


class Words:
    """A tokenizer that gives every prompt the same 35 tokens."""

    def __call__(self, prompts: list[str], **_: Any) -> Any:
        from transformers import BatchEncoding

        ids = torch.ones(len(prompts), imagereward.LENGTH, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": ids})


def image_reward() -> imagereward.ImageReward:
    reward = imagereward.ImageReward.__new__(imagereward.ImageReward)
    reward.vision = random(BlipVisionModel, BlipVisionConfig(**imagereward.VISION))
    reward.text = random(BlipTextModel, BlipTextConfig(**imagereward.TEXT), add_pooling_layer=False)
    sizes = [768, 1024, 128, 64, 16, 1]
    reward.head = torch.nn.Sequential(*[torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])
    reward.head.requires_grad_(False)
    reward.tokenizer, reward.preprocess = Words(), Preprocess()
    return reward


PROMPTS = {"position": "a red circle left of a blue square", "ocr": 'a sign that says "open"'}  # else: one object
NAMED = (
    *("brightness", "saturation", "contrast", "colorfulness", "symmetry", "jpeg", "jpeg-proxy", "ocr"),
    *("oracle", "object-count", "position", "tiny-clip", "tiny-classifier"),
)
REWARDS: dict[str, Callable[[], Reward]] = {name: partial(load, name) for name in NAMED} | {
    "clip-score": partial(clip, VIT_L),
    "aesthetic": aesthetic,
    "imagereward": image_reward,
    "pickscore": partial(clip, VIT_H),
    "hps-v2.1": partial(clip, VIT_H, "pad"),
}


def peak() -> float:
    """The peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, batch: int, side: int, repeats: int) -> None:
    """One line: images/s and peak MB of the forward pass, then of both passes."""
    reward, start = REWARDS[name](), peak()
    images, prompts = torch.rand(batch, 3, side, side), [PROMPTS.get(name, "a red circle")] * batch
    found = [f"{name:16}"]
    for backward in (False, True)[: 1 + reward.differentiable]:
        x, seconds = images.clone().requires_grad_(backward), []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            with torch.set_grad_enabled(backward):
                scores = reward(x, prompts)
                if backward:
                    scores.sum().backward()
            seconds.append(time.perf_counter() - began)
        found.append(f"{batch / min(seconds[1:] or seconds):9.2f} images/s {peak():8.0f} MB")
    print(f"{'  '.join(found)}  (loaded: {start:.0f} MB)", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", nargs="*", default=list(REWARDS), help=f"of {', '.join(REWARDS)}")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2, help="After a first run; 0 counts the first.")
    given = parser.parse_args()
    print(f"batch {given.batch}, {given.side} x {given.side}, float32, {hardware()}")
    for name in given.reward:
        work = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, given.batch, given.side, given.repeats)
        )
        work.start()
        work.join()
        if work.exitcode:
            why = "killed, most likely for want of memory" if work.exitcode == -9 else f"failed with {work.exitcode}"
            print(f"{name:16} {why}", flush=True)
