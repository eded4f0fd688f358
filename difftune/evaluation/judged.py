"""Scores of picture files, one reward after the other, each kept as soon as it is there."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from difftune.errors import RunError
from difftune.evaluation.drawn import EvalImage, release_memory
from difftune.files import output, records
from difftune.files.pictures import read_picture
from rewards import hub
from rewards.registry import load

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Kept:
    """The scores that were given already, in a file: by reward, its weights, the prompt and the picture's bytes."""

    file: Path
    known: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path) -> "Kept":
        """What the file holds; a line that is torn is left out."""
        lines = [line for line in records.records(file) if isinstance(line.get("score"), float | int)]
        return cls(file, {str(line.get("key")): float(line["score"]) for line in lines})

    def add(self, reward: str, scores: Mapping[str, float]) -> None:
        """Keep the scores of these keys, on the disk too."""
        lines = [
            {"step": len(self.known) + i, "reward": reward, "key": key, "score": score}
            for i, (key, score) in enumerate(scores.items())
        ]
        if lines:
            output.append(self.file, "\n".join(json.dumps(line) for line in lines))
        self.known.update(scores)


@dataclass(frozen=True)
class Pictures:
    """Pictures to be scored: files of a folder with their prompts, and the hashes of their bytes."""

    folder: Path
    images: Sequence[EvalImage]
    hashes: Sequence[str]

    @classmethod
    def of(cls, folder: Path, images: Sequence[EvalImage]) -> "Pictures":
        return cls(folder, images, [hub.sha256(folder / image.file) for image in images])

    def keys(self, reward: str) -> list[str]:
        """What the score of each depends on: the reward with its options, its weights, the prompt, the picture."""
        about = [reward, json.dumps(hub.revisions(reward), sort_keys=True)]
        texts = [json.dumps([*about, i.prompt, h]) for i, h in zip(self.images, self.hashes, strict=True)]
        return [hashlib.sha256(text.encode()).hexdigest() for text in texts]

    def batches(self, numbers: Sequence[int], size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The pictures (B, 3, H, W) in [0, 1] of these numbers, so many at a time if they are of one size."""
        held: dict[int, torch.Tensor] = {}
        for i in numbers:
            picture = read_picture(self.folder / self.images[i].file)
            if held and (len(held) == size or picture.shape != next(iter(held.values())).shape):
                yield list(held), torch.stack(list(held.values()))
                held = {}
            held[i] = picture
        if held:
            yield list(held), torch.stack(list(held.values()))


def score_pictures(pictures: Pictures, reward: str, batch_size: int, kept: Kept) -> list[float]:
    """The score of each picture. The reward is loaded if a score is missing, and let go again.

    RunError, which names the picture, for a score that is not finite, once all others are scored and kept.
    """
    keys = pictures.keys(reward)
    todo = [i for i, key in enumerate(keys) if key not in kept.known]
    if todo:
        score_missing(pictures, reward, batch_size, kept, todo)
        release_memory()
    return [kept.known[key] for key in keys]


@torch.no_grad()
def score_missing(pictures: Pictures, reward: str, batch_size: int, kept: Kept, todo: Sequence[int]) -> None:
    """Score the pictures of these numbers."""
    judge, keys = load(reward), pictures.keys(reward)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bad: dict[int, float] = {}
    with tqdm(total=len(todo), desc=reward[:40], disable=None) as bar:
        for numbers, batch in pictures.batches(todo, batch_size):
            scores = judge(batch.to(device), [pictures.images[i].prompt for i in numbers]).double().cpu().tolist()
            found = dict(zip(numbers, scores, strict=True))
            whole = {i: score for i, score in found.items() if abs(score) < float("inf")}
            kept.add(reward, {keys[i]: score for i, score in whole.items()})
            bad |= {i: score for i, score in found.items() if i not in whole}
            bar.update(len(numbers))
    if bad:
        first = min(bad)
        image = pictures.images[first]
        raise RunError(
            f"reward {reward!r} gives {bad[first]} to {image.file} ({image.prompt!r}), which no mean can "
            "count; the other scores are kept"
        )
