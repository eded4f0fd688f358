"""Seconds of a network and a decoder in the memory format `channels_last` and under bfloat16 autocast, beside what is
usual: contiguous float32.

    python scripts/bench_formats.py [--batches 1 4] [--rounds 30] [--output FILE] [--small]

Forwards without a gradient, and forwards and backwards with one in the input; of `tiny`, or of Stable Diffusion 1.5's
size where there is a GPU. Ratios to the usual format, paired by round: median, its 95 % interval, and quartiles. On a
CPU the seconds are this process's own. Every measurement is a line of --output; one that is there is not made again.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from bench_models import sd15
from benching import Run, Store, hardware, paired, ratios, table, weights
from torch import Tensor, nn

from difftune import models
from solvers.latent import LatentModel

Call = Callable[[nn.Module, Tensor], Tensor]
FORMATS = {  # name -> (channels_last, autocast)
    "usual": (False, False),
    "channels_last": (True, False),
    "autocast": (False, True),
    "both": (True, True),
}


def load(device: str) -> Any:
    pipe = sd15(device) if device == "cuda" else models.load("tiny")
    for model in (pipe.unet, pipe.vae):
        model.requires_grad_(False)
    return pipe


def parts(pipe: Any, batch: int) -> dict[str, tuple[nn.Module, Call, Tensor]]:
    """A model, how it is called, and on what."""
    model = LatentModel(pipe)
    with torch.no_grad():
        x = model.noise(batch, [torch.Generator().manual_seed(i) for i in range(batch)])
        text = model.encode(["a red circle"] * batch)["cond"]["encoder_hidden_states"]

    def network(unet: nn.Module, x: Tensor) -> Tensor:
        return unet(x, torch.tensor(500, device=x.device), text, return_dict=False)[0]

    def decoder(decode: nn.Module, x: Tensor) -> Tensor:
        return decode(x)

    return {"network": (pipe.unet, network, x), "decoder": (pipe.vae.decoder, decoder, x)}


def runs(model: nn.Module, call: Call, x: Tensor, backward: bool) -> dict[str, Run]:
    """The same call in each format."""
    last = deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {
        name: partial(run, last if laid_out else model, call, x, autocast, backward)
        for name, (laid_out, autocast) in FORMATS.items()
    }


def run(model: nn.Module, call: Call, x: Tensor, autocast: bool, backward: bool) -> Tensor:
    """The output, or the gradient of its squares in x."""
    narrow: AbstractContextManager[Any] = torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext()
    x = x.clone().requires_grad_(backward)
    with torch.set_grad_enabled(backward), narrow:
        out = call(model, x).float()
    return torch.autograd.grad(out.square().mean(), x)[0] if backward else out


def measured(part: str, batch: int, backward: bool, rounds: int, device: str) -> dict[str, Any]:
    seconds = paired(runs(*parts(load(device), batch)[part], backward), rounds)
    return {"seconds": seconds, "ratios": ratios(seconds, "usual")}


def told(what: str, batch: int, found: Mapping[str, Any]) -> list[list[Any]]:
    rows = [[what, batch, "usual", f"{1000 * statistics.median(found['seconds']['usual']):.1f} ms", ""]]
    for name, (median, q1, q3, low, high) in found["ratios"].items():
        rows.append([what, batch, name, f"{median:.3f} [{low:.3f}, {high:.3f}]", f"{q1:.3f} to {q3:.3f}"])
    return rows


def main(batches: Sequence[int], rounds: int, output: str, small: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store, rows, rounds = Store(output), [], 1 if small else rounds
    model = "sd15" if device == "cuda" else f"tiny {weights('tiny')}"
    print(hardware())
    for part in ("network", "decoder"):
        for backward in (False, True):
            what = f"{part}, {'forwards and backwards' if backward else 'forwards'}"
            for batch in batches:
                measure = partial(measured, part, batch, backward, rounds, device)
                rows += told(what, batch, store.measured(f"{what}-{batch}-{rounds}-{model}-{hardware()}", measure))
    print(table(["what", "batch", "format", "median (ratio to the usual)", "quartiles"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", default="runs/bench_formats.jsonl")
    parser.add_argument("--small", action="store_true", help="one round: whether it works")
    main(**vars(parser.parse_args()))
