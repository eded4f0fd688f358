"""The VAE's latents of image files, which a run asks for again and again, each encoded once."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from difftune.files.pictures import read_fitted
from solvers.latent import LatentModel


@dataclass
class FileLatents:
    """The latents of image files under one pipeline's VAE, which no recipe trains, while there is room for them.

    A picture is encoded alone, so that its bits depend on nothing that is encoded beside it.
    """

    room: int = 2**26  # bytes
    known: OrderedDict[Path, Tensor] = field(default_factory=OrderedDict)  # the latest used last

    @torch.no_grad()
    def __call__(self, model: LatentModel, files: Sequence[Path]) -> Tensor:
        """Latents (B, C, h, w) of image files, which are cropped and resized to the model's size."""
        return torch.cat([self._latent(model, file) for file in files])

    def _latent(self, model: LatentModel, file: Path) -> Tensor:
        found = self.known.pop(file, None)
        if found is None:
            found = model.encode_images(read_fitted(file, *model.size())[None].to(model.device))
        self.known[file] = found
        while len(self.known) * found.nbytes > self.room and len(self.known) > 1:
            self.known.popitem(last=False)
        return found
