"""Seconds and memory of an optimiser step of `alignprop` and `d3po` on a model of Stable Diffusion 1.5's size.

    python scripts/bench_training.py                     a CUDA GPU: 512 x 512, batch 4, bf16, 50 steps, CFG 7.5
    python scripts/bench_training.py --small             an embedded model on any device: whether it works
    python scripts/bench_training.py --where [--small]   any device: where the time of a step goes, for each recipe

The weights are random: they cost what trained ones cost. `alignprop` carries the gradient through the last 10 of 50
steps by recomputing each; `d3po` trains on all 50. Both score images by `saturation`, which costs next to nothing, and
train a LoRA of rank 4. `blocks` recomputes the network block by block too. The memory is the allocator's peak, weights
included, and the seconds are the median of the steps after the first.

`--where` tells the shares of the network, the decoder and the reward, forwards and backwards, of the text encoders, and
of the rest: the sampler, the guidance, the optimiser. With `--small` each recipe is the example tiny-RECIPE on its own
model, with the reward of the example; without, on the model of Stable Diffusion 1.5's size, 512 x 512, batch 4, 10
steps, and tiny-clip, or where there is no GPU, 64 x 64, batch 2, 4 steps in float32 (about 4 GB of weights). The mean
of whole rounds after the first one, by this process's own time on a CPU; a GPU is waited for wherever one part begins,
so that its steps take longer than they do.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from bench_models import sd15
from benching import clock, hardware, heading, peak_memory, reset_peak, row, synchronize
from torch import Tensor, nn

from difftune import models
from difftune.cli.program import cli
from difftune.cli.train import configured
from difftune.configs.recipes import AlignPropConfig, D3POConfig
from difftune.lookup import reward_named
from difftune.pipelines import engine
from difftune.recipes import RECIPES, recipe_of, train
from difftune.training import steps as training_steps
from difftune.training import validation
from rewards.registry import load
from solvers.families.attention import Verdict, choose, obstacle
from solvers.memory.checkpointing import block_checkpointing


def setting(recipe: str, steps: int, small: bool) -> Any:
    """The configuration of a recipe; its first step warms up."""
    shared: dict[str, Any] = {
        "prompts": "animals",
        "max_train_steps": steps + 1,
        "train_batch_size": 4,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "mixed_precision": "bf16",
    }
    if small:
        shared |= {"num_inference_steps": 4, "mixed_precision": "no"}
    most = shared["num_inference_steps"] if small else 10
    if recipe == "alignprop":
        return AlignPropConfig(reward=["saturation"], truncation_min=most, truncation_max=most, **shared)
    return D3POConfig(reward=["saturation"], **shared)


def timed(pipe: Any, config: Any) -> tuple[float, float]:
    """(seconds of a step, peak memory in GB); a number that was not finite ends the run with an error."""
    reset_peak()
    seconds, began = [], time.perf_counter()
    for _ in train(replace(config, max_skipped_steps=0), pipe=pipe, reward=load("saturation")):
        synchronize()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return median(seconds[1:]), (peak_memory() or float("nan")) / 1e9


def variants() -> Iterator[tuple[str, bool]]:
    """(attention, block checkpointing) that can run here."""
    yield from (("sdpa", False), ("sdpa", True))
    if reason := obstacle():
        return print(reason)
    verdict = choose("cuda", torch.bfloat16)
    print(verdict.why)
    if not verdict.why.startswith("xformers fails"):
        yield "xformers", False


def measure(recipes: Sequence[str], steps: int, small: bool) -> None:
    print(hardware())
    chosen, usual = list(variants()), engine.verdict
    print("\n" + heading(["recipe", "attention", "blocks", "seconds a step", "peak, GB"]), flush=True)
    for recipe in recipes:
        for backend, blocks in chosen:
            pipe = models.load("tiny") if small else sd15("cuda")
            engine.verdict = lambda xformers, network, name=backend: Verdict(name, "measured")  # the probe may differ
            try:
                with block_checkpointing(pipe.unet) if blocks else nullcontext():
                    seconds, peak = timed(pipe, setting(recipe, steps, small))
            finally:
                engine.verdict = usual
            print(row([recipe, backend, "yes" if blocks else "no", f"{seconds:.2f}", f"{peak:.1f}"]), flush=True)
            del pipe


# ------------------------------------------------------------------------------------------------ where the time goes


PARTS = ("network", "decoder", "reward", "text", "rest")


@dataclass
class Parts:
    """Seconds by what they are spent on; `now` is what they are spent on at present."""

    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    now: str = "rest"
    since: float = field(default_factory=lambda: clock())

    def to(self, part: str) -> str:
        """From now on it is this part's time. Returns whose it was."""
        synchronize()
        moment, before = clock(), self.now
        self.spent[before] += moment - self.since
        self.now, self.since = part, moment
        return before

    def arriving(self, part: str, value: Any) -> None:
        """From when the gradient of a tensor is there, it is this part's time."""
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda gradient: self.to(part) and None)


@contextmanager
def timed_module(parts: Parts, part: str, module: nn.Module) -> Iterator[None]:
    """The module's calls are the part's time, and so is the way back from their output to their input."""
    before: list[str] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            parts.arriving("rest", args[0])
        before.append(parts.to(part))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts.arriving(part, output[0] if isinstance(output, tuple) else output)
        parts.to(before.pop())

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class TimedReward:
    """A reward whose calls are its part's time, and the way back through them too."""

    reward: Any
    parts: Parts

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.parts.arriving("rest", images)
        before = self.parts.to("reward")
        scores = self.reward(images, prompts)
        self.parts.arriving("reward", scores)
        self.parts.to(before)
        return scores


@contextmanager
def timed_backward(parts: Parts) -> Iterator[None]:
    """After a backward pass it is nobody's time: not every input of a network has a gradient that would tell."""
    usual: Callable[..., None] = training_steps.differentiate

    def differentiate(*arguments: Any) -> None:
        usual(*arguments)
        parts.to("rest")

    training_steps.differentiate = differentiate
    try:
        yield
    finally:
        training_steps.differentiate = usual


def example(name: str) -> Any:
    """The settings of the example tiny-RECIPE."""
    command = cli.commands["train"].commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, ["--config", f"tiny-{name}"]) as context:
        return configured(context, RECIPES[name].config)


SHORT = {  # of a recipe that has them: a step that a CPU takes in a minute
    "gradient_accumulation_steps": 1,
    "num_images_per_prompt": 2,
    "pairs_per_round": 2,
    "updates_per_round": 1,
}


def large(name: str, gpu: bool) -> Any:
    """The settings of a recipe on the model of Stable Diffusion 1.5's size."""
    config = RECIPES[name].config(prompts="animals")
    if gpu:
        return replace(config, train_batch_size=4, num_inference_steps=10, mixed_precision="bf16")
    few: dict[str, Any] = {field: value for field, value in SHORT.items() if field in vars(config)}
    return replace(config, train_batch_size=2, num_inference_steps=4, **few)


def large_model(gpu: bool) -> Any:
    return sd15("cuda") if gpu else sd15("cpu", side=64)


def shares_of_a_step(pipe: Any, config: Any, rounds: int) -> dict[str, float]:
    """Seconds of an optimiser step by part: the mean over whole rounds, after one that is not counted."""
    length = vars(config).get("updates_per_round", 1)
    nothing = {"validation_steps": None, "validation_reward": None, "early_stop": False}
    config = replace(config, max_train_steps=(rounds + 1) * length, resume_from_checkpoint=None, **nothing)
    parts, reward = Parts(), None
    if validation.rewarded(config):
        reward = TimedReward(reward_named(config.reward, gradient=recipe_of(config).reward == "gradient"), parts)
    network = next(part for name in ("unet", "transformer") if (part := pipe.components.get(name)) is not None)
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    with ExitStack() as stack:
        for part, module in [("network", network), ("decoder", pipe.vae.decoder), *(("text", e) for e in encoders)]:
            stack.enter_context(timed_module(parts, part, module))
        stack.enter_context(timed_backward(parts))
        for done, _ in enumerate(train(config, None, pipe, reward), start=1):
            parts.to("rest")
            if done == length:
                parts.spent = dict.fromkeys(parts.spent, 0.0)
    return {part: seconds / (rounds * length) for part, seconds in parts.spent.items()}


def tell_where(recipes: Sequence[str], rounds: int, small: bool) -> None:
    print(hardware())
    print("\n" + heading(["recipe", "seconds a step", *PARTS]), flush=True)
    gpu = torch.cuda.is_available()
    for name in recipes:
        config = example(name) if small else large(name, gpu)
        pipe = models.load(config.model) if small else large_model(gpu)
        spent = shares_of_a_step(pipe, config, rounds)
        total = sum(spent.values())
        print(row([name, f"{total:.3f}", *(f"{seconds / total:.1%}" for seconds in spent.values())]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), help="alignprop and d3po; all, for --where")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not")
    parser.add_argument("--small", action="store_true", help="an embedded model")
    parser.add_argument("--where", action="store_true", help="where the time goes; --steps are then rounds")
    args = parser.parse_args()
    if not (args.small or args.where or torch.cuda.is_available()):
        raise SystemExit("Stable Diffusion 1.5's size needs a CUDA GPU, and there is none: pass --small, or --where")
    if args.where:
        tell_where(args.recipes or list(RECIPES), args.steps, args.small)
    else:
        measure(args.recipes or ["alignprop", "d3po"], args.steps, args.small)
