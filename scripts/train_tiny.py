"""Trains the embedded models on the world of shapes, on one CPU thread or a GPU.

    python scripts/train_tiny.py --state DIR vae decoder clip tiny colour judged flow turbo weak classifier export

A stage that was stopped goes on where DIR left it, one that is finished is skipped, and what a stage needs is trained
first. `warm`, given before all others, begins with the shipped weights in place of random ones.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.tiny import classifier, clip, export, flow, judged, turbo, unet, vae, warm
from scripts.tiny.fit import Setup

STAGES = {
    "warm": warm.write,
    "vae": vae.trained,
    "decoder": vae.finished,
    "clip": clip.trained,
    "tiny": unet.trained,
    "colour": unet.finished,
    "judged": judged.trained,
    "flow": flow.trained,
    "turbo": turbo.trained,
    "weak": unet.weak,
    "classifier": classifier.trained,
    "export": export.write,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--state", type=Path, required=True, help="folder of the state, outside the work tree")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="on a GPU 1024 or more")
    parser.add_argument("--compile", action="store_true", help="on a GPU with CUDA graphs; on a CPU it does not pay")
    parser.add_argument("--steps", nargs="*", default=[], metavar="STAGE=N", help="another number of steps")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    if options.device == "cpu":
        torch.set_num_threads(1)
    steps = dict(pair.split("=", 1) for pair in options.steps)
    if unknown := sorted(steps.keys() - STAGES.keys()):
        parser.error(f"--steps: no stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    counts = {name: int(count) for name, count in steps.items()}
    setup = Setup(options.state, torch.device(options.device), options.seed, options.batch, options.compile, counts)
    for stage in options.stages:
        STAGES[stage](setup)
