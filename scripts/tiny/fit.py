"""What every stage shares: where its state lies, and the training loop that resumes from it."""

import json
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_EVERY = 600.0  # seconds
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """One training of all models. Every random number comes from (seed, stage, step)."""

    state: Path
    device: torch.device = CPU
    seed: int = 0
    batch: int = 64
    compile: bool = False
    steps: Mapping[str, int] = field(default_factory=dict, hash=False)  # of stages that take another number

    def file(self, name: str) -> Path:
        path = self.state / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def compiled(self, module: nn.Module) -> nn.Module:
        if not self.compile:
            return module
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs: these models are launch-bound
        return torch.compile(module, dynamic=False, mode=mode)

    def seeded(self, *words: object) -> None:
        torch.manual_seed(zlib.crc32(" ".join(map(str, (self.seed, *words))).encode()))


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Written beside the file and renamed, so that a process that dies leaves the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file({k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, partial)
    partial.rename(file)


@dataclass
class Fit:
    """One training run: `loss(step)` is minimised over `modules`; their averaged weights are what is kept.

    A run begins with the weights of `start/NAME.safetensors` where the state has that file, else with the modules as
    they are, and goes on where `NAME.safetensors` left it.
    """

    setup: Setup
    name: str
    modules: Mapping[str, nn.Module]
    loss: Callable[[int], Tensor]
    steps: int
    lr: float
    decay: float = 0.999  # of the averaged weights

    def __post_init__(self) -> None:
        self.steps = self.setup.steps.get(self.name, self.steps)
        named = [(f"{m}.{n}", p) for m, module in self.modules.items() for n, p in module.named_parameters()]
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), self.lr, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        )

    def run(self) -> None:
        """Trains what remains to train, and puts the averaged weights into the modules."""
        taken = self._begin()
        began = saved = time.time()
        shown: list[float] = []
        for step in range(taken, self.steps):
            shown.append(self._step(step))
            if time.time() - saved > SAVE_EVERY or step + 1 == self.steps:
                self._save(step + 1)
                saved = time.time()
            if (step + 1) % 50 == 0:
                self._report(step + 1, sum(shown) / len(shown), time.time() - began)
                shown.clear()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])

    def _step(self, step: int) -> float:
        self.setup.seeded(self.name, step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * one_cycle(step / self.steps)
        loss = self.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        rate = 1 - min(self.decay, (step + 1) / (step + 10))
        new = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), new, rate)
        return loss.item()

    def _report(self, step: int, loss: float, seconds: float) -> None:
        print(f"{self.name} {step}/{self.steps} loss {loss:.5f} {seconds:.0f} s", flush=True)
        with self.setup.file("curves.jsonl").open("a") as file:
            file.write(json.dumps({"stage": self.name, "step": step, "loss": loss, "seconds": seconds}) + "\n")

    # ------------------------------------------------------------------------------------------- state on the disk

    def _begin(self) -> int:
        """Loads what there is; the number of steps that were taken."""
        file, start = self.setup.file(f"{self.name}.safetensors"), self.setup.file(f"start/{self.name}.safetensors")
        if not file.exists() and start.exists():
            self._copy(load_file(start, device=str(self.setup.device)), self.parameters)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        if not file.exists():
            return 0
        tensors = load_file(file, device=str(self.setup.device))
        self._copy(_part(tensors, "weights"), self.parameters)
        self._copy(_part(tensors, "average"), self.average)
        for name, parameter in self.parameters.items():
            moments = {key: torch.empty_like(parameter).copy_(tensors[f"{key}/{name}"]) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": tensors["step"].float().cpu()} | moments
        return int(tensors["step"])

    @staticmethod
    @torch.no_grad()
    def _copy(tensors: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
        if missing := sorted(to.keys() - tensors.keys()):
            raise KeyError(f"the state has no {missing[0]!r} and {len(missing) - 1} more: it is of another model")
        for name, target in to.items():
            target.copy_(tensors[name])

    def _save(self, step: int) -> None:
        tensors = {"step": torch.tensor(step)}
        tensors |= {f"weights/{name}": value for name, value in self.parameters.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{key}/{name}": self.optimizer.state[parameter][key] for key in MOMENTS}
        save(tensors, self.setup.file(f"{self.name}.safetensors"))


MOMENTS = ("exp_avg", "exp_avg_sq")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def one_cycle(t: float, warm: float = 0.03) -> float:
    """The learning rate's share at t in [0, 1]: a linear warm-up, then half a cosine to zero."""
    if t < warm:
        return 0.04 + 0.96 * t / warm
    return 0.5 * (1 + cos(pi * (t - warm) / (1 - warm)))
