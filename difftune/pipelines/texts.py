"""Prompts' conditions, which a run asks for again and again, each encoded once."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from solvers.denoiser import Cond
from solvers.latent import LatentModel
from solvers.modules import hooked
from solvers.rollout.recompute import Networks, stamp


@dataclass
class Texts:
    """The conditions of the prompts of one pipeline, each encoded once while there is room for it.

    A prompt is encoded alone, so that its bits depend on nothing that is encoded beside it or was before. All are
    encoded anew if a text encoder was moved, cast, replaced or written to, or its adapters or a tokenizer changed.
    """

    room: int = 2**26  # bytes
    known: OrderedDict[Any, dict[str, Cond]] = field(default_factory=OrderedDict)  # the latest used last
    by: "Encoders | None" = None  # that encoded them

    @torch.no_grad()
    def __call__(
        self, model: LatentModel, texts: Sequence[str], height: int | None = None, width: int | None = None
    ) -> dict[str, Cond]:
        """{"cond": Cond, "uncond": Cond} of these prompts, one row for each, for images of that size."""
        now = encoders_now(model)
        if self.by is None or self.by.state != now.state:
            self.known.clear()
            self.by = now
        rows = [self._row(model, text, height, width) for text in texts]
        return {name: joined([row[name] for row in rows]) for name in rows[0]}

    def _row(self, model: LatentModel, text: str, height: int | None, width: int | None) -> dict[str, Cond]:
        key = (text, model.size(height, width), model.embedded_guidance)
        row = self.known.pop(key, None) or model.encode(text, None, height, width)
        self.known[key] = row
        size = sum(value.nbytes for cond in row.values() for value in cond.values())
        while len(self.known) * size > self.room and len(self.known) > 1:
            self.known.popitem(last=False)
        return row


class Encoders(NamedTuple):
    """The text encoders of a pipeline at one moment."""

    state: tuple[Any, ...]  # all that their output depends on
    held: tuple[Any, ...]  # what the state names by its `id`, which nothing else has as long as this is held


def encoders_now(model: LatentModel) -> Encoders:
    """The parts of the pipeline that are neither its networks nor its VAE, their weights, adapters and tokenizers.

    A write through `.data` counts nowhere: of each weight one number in its middle is compared. Weights that are moved
    in and out by hooks are not looked at, but for their count of writes.
    """
    others = (*model.family.denoisers, "vae")
    parts = {name: part for name, part in model.pipe.components.items() if name not in others and part is not None}
    encoders = tuple(part for part in parts.values() if isinstance(part, nn.Module))
    weights = [weight for encoder in encoders for weight in encoder.parameters()]
    networks = Networks.of(encoders)
    tokenizers = {name: part for name, part in parts.items() if name.startswith(("tokenizer", "processor"))}
    words = tuple((id(part), len(part) if name.startswith("tokenizer") else 0) for name, part in tokenizers.items())
    counts = tuple((id(w), w.dtype, -1 if w.is_inference() else w._version) for w in weights)
    places = () if hooked(encoders) else (*((w.data_ptr(), w.device) for w in weights), *middles(weights))
    state = (tuple(map(id, encoders)), stamp((), networks), counts, places, words, model.device)
    return Encoders(state, (encoders, weights, networks, tokenizers))


def middles(weights: Sequence[Tensor]) -> list[float]:
    """One number of each weight."""
    some = [w.detach()[tuple(side // 2 for side in w.shape)] for w in weights if w.numel()]
    return torch.stack([value.to(some[0].device, torch.float32) for value in some]).tolist() if some else []


def joined(rows: Sequence[Cond]) -> Cond:
    """Conditions of single prompts as one of a batch: texts (1, L, D) of different lengths are padded with zeros to the
    longest, and `NAME_mask` (B, L) tells the tokens of NAME."""
    ragged = [key for key, value in rows[0].items() if value.ndim == 3 and len({row[key].shape[1] for row in rows}) > 1]
    for key in ragged:
        rows = [{f"{key}_mask": row[key].new_ones(row[key].shape[:2], dtype=torch.bool), **row} for row in rows]
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: padded(each) if key.removesuffix("_mask") in ragged else torch.cat(each) for key, each in batch.items()
    }


def padded(texts: Sequence[Tensor]) -> Tensor:
    return pad_sequence([text[0] for text in texts], batch_first=True)
