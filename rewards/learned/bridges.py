"""Rewards of other libraries: any metric of pyiqa, and any function of torchmetrics.functional.image."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module, util
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rewards.checks import paired, seen
from rewards.errors import ExtraMissing, RewardError
from rewards.learned.reference import Picture, Reference
from rewards.registry import Entry, unknown

OF_SETS = ("fid", "sfid", "fid_dinov2", "inception_score", "kid")  # metrics that no single picture has
RANGES: dict[str, tuple[float, float]] = {  # of metrics of pyiqa, by its own table; negated where lower is better
    "musiq": (0, 100), "musiq-ava": (1, 10), "topiq_nr": (0, 1), "topiq_iaa": (1, 10), "clipiqa": (0, 1),
    "clipiqa+": (0, 1), "maniqa": (0, 1), "nima": (0, 10), "qalign": (1, 5), "qrealign": (0, 1), "hyperiqa": (0, 1),
    "liqe": (1, 5), "arniqa": (0, 1), "laion_aes": (1, 10), "niqe": (-100, 0), "brisque": (-150, 0),
}  # fmt: skip
NO_GRADIENT = ("nrqm", "pi", "brisque", "ilniqe", "niqe", "piqe")  # pyiqa cannot differentiate these
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # of torch: no pickle runs code, whatever its caller asks for


def require(library: str, extra: str, why: str = "") -> None:
    """ExtraMissing if a library is not installed."""
    if util.find_spec(library) is None:
        raise ExtraMissing(f"the reward {extra!r} needs an extra{why}: pip install 'difftune[{extra}]'")


def compared(reference: Any, metric: str, wanted: bool) -> Reference | None:
    """The reference of a metric that compares, None for one that does not. RewardError for too much or too little."""
    if wanted and reference is None:
        raise RewardError(f"{metric} compares with a picture: give reference=FILE")
    if not wanted and reference is not None:
        raise RewardError(f"{metric} looks at one picture alone: leave the reference out")
    return Reference(reference) if wanted else None


# ------------------------------------------------------------------------------------------------ pyiqa


class PyIQA:
    """A metric of pyiqa (https://github.com/chaofengc/IQA-PyTorch), negated if lower is better.

    pyiqa, and some of its weights, are for non-commercial use. It downloads weights without a hash, so that they are
    read without running code; a metric whose weights hold more than tensors is refused. `reference` is for metrics that
    compare. Pictures are within [0, 1]. Raises ValueError for an unknown metric, and for one of sets.
    """

    def __init__(self, metric: str, reference: Picture | Mapping[str, Picture] | None = None):
        require("pyiqa", "pyiqa", " of its own, for non-commercial use")
        library = import_module("pyiqa")
        known = library.list_models()
        if metric in OF_SETS:
            raise RewardError(f"{metric} is of a set of pictures, and a reward is of one: choose another metric")
        if metric not in known:
            raise RewardError(unknown("metric of pyiqa", metric, known))
        self.differentiable = metric not in NO_GRADIENT
        self.metric, self.network = metric, safely_made(library, metric, self.differentiable)
        self.reference = compared(reference, metric, self.network.metric_mode == "FR")
        self.sign = -1.0 if self.network.lower_better else 1.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        x = seen(images) if self.differentiable else seen(images.detach())
        network = self.network.to(x.device)
        return torch.stack([self.score(network, x[i : i + 1], prompts[i : i + 1]) for i in range(len(x))])

    def score(self, network: Any, x: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score (), of a picture (1, 3, H, W)."""
        if not x.detach().isfinite().all():
            return x.mean()  # NaN, with the picture's graph
        pair = (x,) if self.reference is None else (x, self.reference(x, prompts))
        return self.sign * network(*pair).float().reshape(())


def of_metric(about: Entry, options: Mapping[str, Any]) -> Entry:
    """What is known of the reward that is the metric which the options name."""
    metric = str(options.get("metric"))
    return replace(
        about, range=RANGES.get(metric, about.range), differentiable=about.differentiable and metric not in NO_GRADIENT
    )


def safely_made(library: Any, metric: str, gradient: bool) -> Any:
    """The metric, whose weights are read without running code; its scores are not averaged over a batch."""
    loss = {"as_loss": True, "loss_reduction": "none"} if gradient else {}
    with weights_only():
        try:
            return library.create_metric(metric, device="cpu", **loss).eval().requires_grad_(False)
        except UnpicklingError as error:
            raise RewardError(f"pyiqa's weights of {metric} hold more than tensors, and are not unpickled") from error


@contextmanager
def weights_only() -> Iterator[None]:
    """Within, torch.load runs no code, even where its caller says weights_only=False."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


# ------------------------------------------------------------------------------------------------ torchmetrics


LOWER = {  # functions of which less is better
    "total_variation", "learned_perceptual_image_patch_similarity", "deep_image_structure_and_texture_similarity",
    "root_mean_squared_error_using_sliding_window", "spectral_angle_mapper", "relative_average_spectral_error",
    "error_relative_global_dimensionless_synthesis", "spectral_distortion_index", "spatial_distortion_index",
}  # fmt: skip


class TorchMetrics:
    """A function of `torchmetrics.functional.image`, such as structural_similarity_index_measure, negated if lower is
    better.

    It is called on one picture at a time, in [0, 1], with `reference` if it takes a target, and with `options`; a
    function whose pictures are in [-1, 1] unless it is told `normalize` is told. Raises ValueError for an unknown
    function, and for one that takes more than a picture and a reference.

    learned_perceptual_image_patch_similarity builds its network anew for every picture, and downloads it without a
    hash: the reward `lpips` is the same distance by AlexNet without either.
    """

    differentiable = True

    def __init__(
        self,
        metric: str,
        reference: Picture | Mapping[str, Picture] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        require("torchmetrics", "torchmetrics")
        known = vars(import_module("torchmetrics.functional.image"))
        names = [name for name, thing in known.items() if inspect.isfunction(thing) and not name.startswith("_")]
        if metric not in names:
            raise RewardError(unknown("function of torchmetrics.functional.image", metric, names))
        function: Callable[..., Any] = known[metric]
        takes = inspect.signature(function).parameters
        told = of_unit_range(takes) | dict(options or {})
        compares = list(takes)[1:2] in (["target"], ["img2"])
        fits(metric, takes, told, 2 if compares else 1)
        self.reference = compared(reference, metric, compares)
        self.function = partial(function, **told)
        self.sign = -1.0 if metric in LOWER else 1.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        x = seen(images)
        return torch.stack([self.score(x[i : i + 1], prompts[i : i + 1]) for i in range(len(x))])

    def score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score (), of a picture (1, 3, H, W)."""
        if not x.detach().isfinite().all():
            return x.mean()  # NaN, with the picture's graph
        pair = (x,) if self.reference is None else (x, self.reference(x, prompts))
        found = self.function(*pair)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise RewardError("this function of torchmetrics gives no single number for a picture: choose another")
        return self.sign * found.float().reshape(())


def of_unit_range(takes: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """What tells a function of these parameters that pictures are within [0, 1]."""
    range_of = {"data_range": 1.0} if "data_range" in takes else {}
    signed = "normalize" in takes and takes["normalize"].default is False  # that of MS-SSIM is another thing
    return range_of | ({"normalize": True} if signed else {})


def fits(metric: str, takes: Mapping[str, inspect.Parameter], told: Mapping[str, Any], pictures: int) -> None:
    """RewardError if a function needs more than so many pictures and what it is told."""
    needs = [name for name, about in takes.items() if about.default is about.empty and name not in told]
    if more := needs[pictures:]:
        has = "a picture and a reference" if pictures == 2 else "a picture"
        raise RewardError(
            f"{metric} needs {' and '.join(more)} besides {has}, which a reward does not have: choose another function"
        )
