"""LPIPS (https://arxiv.org/abs/1801.03924): how near a picture is to a reference, as people see it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewards import hub
from rewards.checks import dtype_of, paired, seen
from rewards.errors import RewardError
from rewards.learned.layouts import under
from rewards.learned.reference import Picture, Reference

HEADS = Path(__file__).parents[1] / "weights" / "lpips" / "alex.safetensors"  # lin0 ... lin4 of lpips 0.1.4, v0.1
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
LOOKS = (1, 4, 7, 9, 11)  # layers of AlexNet whose output is compared: the five ReLUs
SMALLEST = 64  # pixels of the shorter side that AlexNet needs; a smaller picture is enlarged


class LPIPS:
    """-d(x, reference), 0 if they are equal and about -1 if they have nothing in common:

        d = sum over layers l of  mean over places of  w_l . (f_l(x) - f_l(reference))^2,

    with f_l AlexNet's features after its l-th ReLU, of unit length at each place, and w_l >= 0 LPIPS v0.1's weights,
    which are bundled. `reference` is a picture (a file, or (3, H, W) in [0, 1]), or one for every prompt. `weights` is
    a local file of torchvision's AlexNet in place of the pinned one. Raises ValueError for a prompt without a
    reference.
    """

    differentiable = True

    def __init__(
        self,
        reference: Picture | Mapping[str, Picture],
        weights: str | Path | None = None,
        dtype: str = "float32",
    ):
        self.reference = Reference(reference)
        state = under(hub.state("alexnet") if weights is None else hub.read(weights), "features.")
        self.network = alexnet(state).to(dtype_of(dtype))
        self.heads = [load_file(HEADS)[f"lin{i}"] for i in range(len(LOOKS))]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        paired(images, prompts)
        x = seen(images)
        with torch.no_grad():
            others = self.features(self.reference(x, prompts))
        layers = zip(self.features(x), others, self.heads, strict=True)
        apart = [((a - b).square() * w.to(a)[:, None, None]).sum(1).mean((1, 2)) for a, b, w in layers]
        return -torch.stack(apart).sum(0)

    def features(self, x: Tensor) -> list[Tensor]:
        """Features of unit length, (B, C, h, w) each, in float32, of pictures (B, 3, H, W) in [0, 1]."""
        side = min(x.shape[-2:])
        if side < SMALLEST:
            size = [round(length * SMALLEST / side) for length in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        shift, scale = (x.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
        network, found = self.network.to(x.device), list[Tensor]()
        x = ((2 * x - 1 - shift) / scale).to(next(network.parameters()).dtype)
        for i, layer in enumerate(network):
            x = layer(x)
            found += [F.normalize(x.float(), dim=1, eps=1e-10)] if i in LOOKS else []
        return found


def alexnet(state: Mapping[str, Tensor]) -> nn.Sequential:
    """The convolutions of torchvision's AlexNet, frozen. Raises ValueError for weights that do not fit."""

    def convolution(into: int, out: int, side: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(into, out, side, stride, padding), nn.ReLU()]

    layers = [*convolution(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), *convolution(64, 192, 5, 1, 2), nn.MaxPool2d(3, 2)]
    layers += [*convolution(192, 384, 3), *convolution(384, 256, 3), *convolution(256, 256, 3)]
    network = nn.Sequential(*layers)
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        raise RewardError(f"the weights do not fit AlexNet: {' '.join(str(error).split())[:200]}") from error
    return network.eval().requires_grad_(False)


def fetch_lpips(weights: str | Path | None = None, **_: object) -> list[Path]:
    """What LPIPS downloads."""
    return [] if weights is not None else [hub.weights("alexnet")]
