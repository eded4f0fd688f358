"""Stage `turbo`: `tiny-turbo`, distilled from `tiny` to 1-4 steps without guidance."""

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from rewards.world import draw, grammar
from scripts.tiny import clip, scenes, unet, words
from scripts.tiny.fit import Fit, Setup, save

SOLVER_STEPS = 8
GUIDANCE = 3.0
TRAJECTORIES, PART = 12_000, 250


def trained(setup: Setup, steps: int = 4000) -> UNet2DConditionModel:
    """Maps any point of the teacher's guided trajectory to its end, half of the time from pure noise.

    Supervised consistency distillation (https://arxiv.org/abs/2310.04378, with the solver's own end point as the
    target): x0 = alpha x - sigma v is regressed with a pseudo-Huber loss.
    """
    parts = [load_file(file) for file in trajectories(setup)]
    x, ids, times = torch.cat([p["x"] for p in parts]), torch.cat([p["ids"] for p in parts]), parts[0]["t"]
    student = unet.make(setup, "turbo")
    student.load_state_dict(unet.finished(setup).state_dict())
    student.train()
    network = setup.compiled(student)
    alphas, text = unet.alphas_cumprod(setup), clip.text_encoder(setup)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(x), (setup.batch,))
        at = torch.where(torch.rand(setup.batch) < 0.5, 0, torch.randint(0, SOLVER_STEPS, (setup.batch,)))
        start, end, t = x[chosen, at], x[chosen, -1], times[at]
        start, end, t = start.to(setup.device), end.to(setup.device), t.to(setup.device)
        power = alphas[t].view(-1, 1, 1, 1)
        with torch.no_grad():
            states = text(ids[chosen].to(setup.device)).last_hidden_state
        v = network(start.contiguous(memory_format=torch.channels_last), t, states).sample
        x0 = power.sqrt() * start - (1 - power).sqrt() * v
        return ((x0 - end).square().flatten(1).sum(1) + 0.01).sqrt().mean()

    Fit(setup, "turbo", {"unet": student}, loss, steps, 8e-4).run()
    return student.eval()


def trajectories(setup: Setup) -> list[Path]:
    """The teacher's guided trajectories, parts on disk: x (B, 9, 4, 8, 8) from noise to data, t (8,), ids (B, 20)."""
    files = [setup.file(f"trajectories/{part}.safetensors") for part in range(TRAJECTORIES // PART)]
    for part, file in enumerate(files):
        if not file.exists():
            save(teach(setup, part), file)
            print(f"trajectories {(part + 1) * PART} of {TRAJECTORIES}", flush=True)
    return files


def teach(setup: Setup, part: int) -> dict[str, Tensor]:
    """One part, for captions of a stream of their own."""
    rng = np.random.default_rng([setup.seed, 7, part])
    ids = words.tokens([str(draw_caption(rng)) for _ in range(PART)])
    setup.seeded("trajectories", part)
    x = torch.randn(PART, 4, 8, 8, device=setup.device)
    times, xs = unet.guided(setup, x, ids, SOLVER_STEPS, GUIDANCE)
    return {"x": torch.stack(xs, 1), "t": times, "ids": ids}


def draw_caption(rng: np.random.Generator) -> grammar.Caption:
    """A caption that no list of prompts tests."""
    while True:
        kind = str(rng.choice(list(scenes.SHARES), p=list(scenes.SHARES.values())))
        caption = draw.draw_caption(rng, kind)
        if grammar.content(caption) not in draw.held_out():
            return caption
