"""`report.html` of an evaluation: each reward's numbers, pictures beside the baseline's, and a table of all prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from difftune.evaluation.results import Evaluated, Pairs, pair_up
from difftune.files.pictures import read_picture
from difftune.reports import pages

SHOWN = 24  # prompts with pictures, evenly chosen from the list
SIDE = 256  # pixels of a picture's longer side, at most


class Row(NamedTuple):
    """A prompt in the table of all."""

    prompt: str
    category: str
    scores: list[tuple[float, float | None]]  # by reward: now, and the change


def eval_page(found: Mapping[str, Any], now: Evaluated, then: Evaluated | None) -> str:
    """The page of an evaluation, from what eval.json holds."""
    pairs = None if then is None else pair_up(now, then)
    settings = {name: value for name, value in found["settings"].items() if value not in (None, {}, (), [])}
    return pages.render(
        "evaluation.html.j2",
        title=title_of(settings),
        about=about(now, then, found),
        rewards=found["rewards"],
        paired_by=found.get("paired_by"),
        unknown=now.trained is None,
        notes=notes(found["rewards"]),
        pictures=side_by_side(now, then, pairs),
        rows=rows(now, then, pairs),
        settings=[(name, in_words(value)) for name, value in settings.items()],
        versions=found["versions"],
    )


def title_of(settings: Mapping[str, Any]) -> str:
    """What was evaluated: the model with its LoRAs, or a folder."""
    lora = settings.get("lora")
    return f"Evaluation of {settings.get('model') or settings['images']}{f' with {in_words(lora)}' if lora else ''}"


def in_words(value: Any) -> str:
    """A setting as a shell user writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def about(now: Evaluated, then: Evaluated | None, found: Mapping[str, Any]) -> str:
    """What was evaluated, in a sentence or two."""
    count = len(now.categories)
    said = f"{len(now.images)} pictures of {count} prompt{'s' if count != 1 else ''}."
    if then is None:
        return said
    shared = next(iter(found["rewards"].values()))["difference"]["n_prompts"]
    return f"{said} Compared with {found['settings']['baseline']}, on {shared} shared, paired by {found['paired_by']}."


def notes(rewards: Mapping[str, Any]) -> list[str]:
    """What a reader must know of these rewards."""
    found = []
    for name, facts in rewards.items():
        if facts["trained_on"]:
            found.append(f"{name}: the model was trained on it, so that its score is not evidence of quality.")
        if not facts["comparable_across_prompts"]:
            found.append(f"{name}: it ranks pictures of one prompt; only the difference and the wins mean something.")
        if facts["noncommercial"]:
            found.append(f"{name}: its licence is for non-commercial use ({facts['licence']}).")
    return found


def rows(now: Evaluated, then: Evaluated | None, pairs: Pairs | None) -> list[Row]:
    """Every prompt, with each reward's mean score and its change."""
    means = {name: now.means(name) for name in now.scores}
    shared = set() if pairs is None else set(pairs.prompts)
    paired = {} if then is None or pairs is None else {name: changes(now, then, pairs, name) for name in now.scores}
    return [
        Row(
            prompt,
            category,
            [(means[name][prompt], paired[name][prompt] if prompt in shared else None) for name in now.scores],
        )
        for prompt, category in now.categories.items()
    ]


def changes(now: Evaluated, then: Evaluated, pairs: Pairs, reward: str) -> dict[str, float]:
    """The change of each shared prompt."""
    after, before = now.means(reward, pairs.keys), then.means(reward, pairs.keys)
    return {prompt: after[prompt] - before[prompt] for prompt in pairs.prompts}


# ------------------------------------------------------------------------------------------------ pictures


def side_by_side(
    now: Evaluated, then: Evaluated | None, pairs: Pairs | None
) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Some prompts, each with its first picture of the baseline, if that is kept, and of this run."""
    prompts = list(now.categories) if pairs is None else pairs.prompts
    chosen = np.linspace(0, len(prompts) - 1, min(len(prompts), SHOWN)).round().astype(int)
    keys = None if pairs is None else pairs.keys
    ways = [("baseline", then), ("this run", now)] if then is not None and then.pictures is not None else [("", now)]
    found = {name: first_files(way, keys) for name, way in ways if way is not None}
    return [
        (prompts[i], [(name, thumbnail(files[prompts[i]])) for name, files in found.items() if prompts[i] in files])
        for i in chosen
    ]


def first_files(found: Evaluated, keys: set[tuple[str, int]] | None) -> dict[str, Path]:
    """The first picture of each prompt, among those of `keys`."""
    files: dict[str, Path] = {}
    assert found.pictures is not None
    for image in found.images:
        if (keys is None or (image.prompt, image.seed) in keys) and (found.pictures / image.file).is_file():
            files.setdefault(image.prompt, found.pictures / image.file)
    return files


def thumbnail(file: Path) -> np.ndarray:
    """The picture (H, W, 3) in [0, 1], no side longer than `SIDE`."""
    picture = read_picture(file).permute(1, 2, 0).numpy()
    scale = SIDE / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    small = Image.fromarray((picture * 255).round().astype("uint8")).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(small) / 255


def of_one_size(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The pictures in the middle of white ones that hold them all."""
    height, width = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    return [centred(p, height, width) for p in pictures]


def centred(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    rest = ((top, height - picture.shape[0] - top), (left, width - picture.shape[1] - left), (0, 0))
    return np.pad(picture, rest, constant_values=1.0)
