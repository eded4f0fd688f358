"""How the gradients of a few network calls compare with that of the whole run, on the embedded flow model.

    python scripts/bench_surrogates.py            # minutes on one core

For each mode: network forwards of an image, a backward pass counted as two; the cosine of one draw's gradient with the
exact one of the same images; that of the mean over all draws and images; and the length of that mean, beside the exact
one's. All modes hold one graph of the network at a time.
"""

import argparse
import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from difftune.configs.recipes import AlignPropConfig, DrtuneConfig
from difftune.files.prompts import prompts_named
from difftune.lookup import reward_named
from difftune.models import load
from difftune.recipes.drtune import spread_steps
from difftune.recipes.reward_gradient import count_carrying
from difftune.recipes.surrogates import surrogate_named
from difftune.rollouts.session import Session, open_session

STEPS = 10
Draw = Callable[[int], str]  # number -> mode of the engine


def modes(session: Session[AlignPropConfig]) -> dict[str, Draw]:
    """Each mode's draws; K = 3 where there is a K, so that all but leapalign and direct-align cost the same."""
    drtune = spread_steps(DrtuneConfig(num_inference_steps=STEPS, truncation_steps=3)).of
    assert drtune is not None

    def drawn(name: str, number: int) -> str:
        return surrogate_named(name).draw(random.Random(number), session.images.levels, number)

    names = ("flowbp[active=3]", "flowbp[active=3,alpha=0.5,rho=0]", "leapalign", "direct-align[up=0]")
    return {
        "draft, K = 3": lambda number: "truncated:3",
        "refl, K = 1 to 10": lambda number: f"truncated:{1 + number % STEPS}:refl",
        "drtune, K = 3": drtune,
        **{name: partial(drawn, name) for name in names},
    }


def forwards(mode: str) -> int:
    """Network calls for an image; ReFL ends its run where it predicts the image."""
    early = int(mode.split(":")[1]) if mode.endswith(":refl") else 0
    return STEPS - early + 3 * count_carrying(mode, STEPS)


def gradient(session: Session[AlignPropConfig], mode: str, numbers: range) -> Tensor:
    """The gradient of the images' mean reward with respect to the LoRA, flat."""
    drawn = session.images.draw(session.prompts, numbers, mode)
    scores = session.reward(session.images.decode(drawn), drawn.prompts)
    weights = list(session.run.weights.values())
    found = torch.autograd.grad(scores.mean(), weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, found, strict=True)])


def measure(batches: int, size: int, draws: int) -> None:
    """Print the table."""
    config = AlignPropConfig(model="tiny-flow", guidance="none", num_inference_steps=STEPS, gradient="checkpoint")
    pipe, prompts = load(config.model), prompts_named(config.prompts, config.seed)
    reward = reward_named(config.reward, gradient=True)
    print("| gradient | forwards of an image | cosine, one draw | cosine, mean | length, mean |")
    print("| --- | --- | --- | --- | --- |")
    with open_session(config, None, pipe, prompts, reward, False, lambda line: None) as session:
        numbers = [range(i * size, (i + 1) * size) for i in range(batches)]
        exact = torch.stack([gradient(session, "checkpoint", some) for some in numbers])
        for name, draw in modes(session).items():
            found, cost = [], 0.0
            for i, some in enumerate(numbers):
                options = [draw(i * draws + j) for j in range(draws)]
                cost += sum(map(forwards, options)) / draws / batches
                found.append(torch.stack([gradient(session, mode, some) for mode in options]))
            each, mean = torch.stack(found), torch.stack(found).mean((0, 1))
            one = torch.cosine_similarity(each, exact[:, None], -1).mean()
            both = torch.cosine_similarity(mean, exact.mean(0), 0)
            length = mean.norm() / exact.mean(0).norm()
            print(f"| {name} | {cost:.3g} | {one:.2f} | {both:.2f} | {length:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--size", type=int, default=4)
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    measure(arguments.batches, arguments.size, arguments.draws)
