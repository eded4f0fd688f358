"""Compares our rewards on their published weights with the scores that their authors print, and with their own code.

    python scripts/check_parity.py [REWARD ...] [--data FOLDER] [--output docs/parity.md]

For each published checkpoint the weights are fetched and verified (`difftune rewards prefetch`), and the pictures that
its authors show are scored, and random ones. Compared are the scores that they print, and what their package gives if
it is installed (image-reward, hpsv2, hpsv3), or the code of the model's card. The pictures are fetched into --data, and
known by their hashes. A row for each is printed, and written as the table of the docs; the exit status is 1 if one
disagrees.
"""

import argparse
import hashlib
import sys
import urllib.request
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from rewards import hub
from rewards.checks import png
from rewards.errors import RewardError
from rewards.learned.reference import opened
from rewards.registry import Reward, load

DATA = Path("~/.cache/difftune/parity").expanduser()
RANDOM = 4  # random pictures
SIDE = 512  # of them, in pixels
IMAGEREWARD = "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/"
PICTURES = {  # name: where it is, and its hash
    "1.webp": (IMAGEREWARD + "1.webp", "a5fcd126763da8b3fe2a9e620fc1ba03d215d20de36c77bf6770a540a9bc972d"),
    "2.webp": (IMAGEREWARD + "2.webp", "dc13919a49a37987d19c8be3ba0c1ef2941570f820f90fb66ac91a9a9db24082"),
    "3.webp": (IMAGEREWARD + "3.webp", "ee859bac167e6a04cbcde63454757b6fc7d9b8704429c15725ca8c4accf176e3"),
    "4.webp": (IMAGEREWARD + "4.webp", "84faf59d59d9ca7ab298c9acb957d727365ae104768ac1a1ec55ab96be68aaf9"),
    "CLIP.png": (
        "https://raw.githubusercontent.com/tgxs002/HPSv2/master/hpsv2/tests/docs/CLIP.png",
        "308a3ca4503f1c7a07803916c369d78c4ef501e5ab7fc727da9b5e1d2f9ec85b",
    ),
}
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"

Theirs = Callable[[Sequence[Path], Sequence[str]], list[float]]  # files and prompts -> scores


class Case(NamedTuple):
    """A published checkpoint: pictures, prompts, and what is known of their scores."""

    reward: str  # with its options
    pictures: Sequence[str]
    prompts: Sequence[str]
    printed: Sequence[float] = ()  # by its authors, of these pictures and prompts
    of_scores: Callable[[Tensor], Tensor] = lambda scores: scores  # what they print of the scores
    tolerance: float = 0.02
    package: str = ""  # theirs
    theirs: Theirs | None = None


class Row(NamedTuple):
    """What was found for a case."""

    reward: str
    weights: str  # their revisions
    printed: str  # largest difference from the printed scores
    theirs: str  # largest difference from their code, and its version
    agrees: bool | None  # None: nothing could be compared


# ------------------------------------------------------------------------------------------------ their own code


def image_reward(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", device="cpu")
    return [float(model.score(prompt, str(file))) for file, prompt in zip(files, prompts, strict=True)]


def hps_v2(version: str) -> Theirs:
    def scores(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        import hpsv2

        pairs = zip(files, prompts, strict=True)
        return [float(hpsv2.score(str(file), prompt, hps_version=version)[0]) for file, prompt in pairs]

    return scores


def hps_v3(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    from hpsv3 import HPSv3RewardInferencer

    judge = HPSv3RewardInferencer(device="cuda" if torch.cuda.is_available() else "cpu")
    return [float(found[0]) for found in judge.reward(image_paths=list(map(str, files)), prompts=list(prompts))]


@torch.no_grad()
def pick_score(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    """As the model's card computes it."""
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained("laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    model = AutoModel.from_pretrained("yuvalkirstain/PickScore_v1").eval()
    return [clip_logit(model, processor, file, prompt) for file, prompt in zip(files, prompts, strict=True)]


def clip_logit(model: Any, processor: Any, file: Path, prompt: str) -> float:
    """The logit of a CLIPModel by its own processor, on the picture of a file."""
    with Image.open(file) as image:
        given = processor(text=[prompt], images=[image.convert("RGB")], return_tensors="pt", padding="max_length",
                          truncation=True, max_length=model.config.text_config.max_position_embeddings)  # fmt: skip
    return float(model(**given).logits_per_image)


# ------------------------------------------------------------------------------------------------ the cases


def softmax(scores: Tensor) -> Tensor:
    """The probabilities of several prompts for one picture, from cosines, as CLIP's README prints them."""
    return (100 * scores).softmax(0)


FOUR = ("1.webp", "2.webp", "3.webp", "4.webp")
OCEANS = (OCEAN,) * 4
CASES = [
    Case(
        "imagereward", FOUR, OCEANS,
        (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492),
        package="image-reward", theirs=image_reward,
    ),
    Case(
        "open-clip[model=ViT-B-32-quickgelu, pretrained=openai]", ("CLIP.png",) * 3, ("a diagram", "a dog", "a cat"),
        (0.9927937, 0.00421068, 0.00299572), softmax, 0.002,
    ),
    Case("pickscore", FOUR, OCEANS, package="transformers", theirs=pick_score),
    Case("hps-v2", FOUR, OCEANS, tolerance=0.002, package="hpsv2", theirs=hps_v2("v2.0")),
    Case("hps-v2.1", FOUR, OCEANS, tolerance=0.002, package="hpsv2", theirs=hps_v2("v2.1")),
    Case("hps-v3", FOUR, OCEANS, tolerance=0.05, package="hpsv3", theirs=hps_v3),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ comparing


def fetch_picture(folder: Path, name: str) -> Path:
    """The picture of that name in a folder, fetched if it is not there. RewardError if it has another hash."""
    url, digest = PICTURES[name]
    file = folder / name
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                file.write_bytes(answer.read(2**24))
        except OSError as error:
            raise RewardError(f"cannot fetch {url}: {error}") from error
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise RewardError(f"{file} is not the picture that was published: remove it")
    return file


def random_pictures(folder: Path, count: int = RANDOM, side: int = SIDE) -> list[Path]:
    """Pictures of coloured noise, smooth to rough, as PNG."""
    files = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        noise = torch.rand(1, 3, 4 ** (i + 1), 4 ** (i + 1), generator=generator)
        x = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)[0]
        files.append(folder / f"random{i}.png")
        files[-1].write_bytes(png((x.permute(1, 2, 0) * 255).round().byte().numpy()))
    return files


@torch.no_grad()
def scores_of(reward: Reward, files: Sequence[Path], prompts: Sequence[str]) -> Tensor:
    """Our scores, in float64."""
    pairs = zip(files, prompts, strict=True)
    return torch.cat([reward(opened(file)[None], [prompt]) for file, prompt in pairs]).double().cpu()


def compare(case: Case, data: Path, random: Sequence[Path], **options: Any) -> Row:
    """Score the pictures of a case, and random ones, and compare. options: of the reward, beside those in its name."""
    if not options:
        hub.prefetch(case.reward)
    reward = load(case.reward, **options)
    files = [fetch_picture(data, name) for name in case.pictures]
    revisions = "" if options else ", ".join(f"{k}@{v[:8]}" for k, v in hub.revisions(case.reward).items())
    ours = scores_of(reward, files, case.prompts)
    printed = gap(case.of_scores(ours), case.printed) if case.printed else None
    theirs = None
    if case.theirs is not None and installed(case.package):
        shown, words = [*files, *random], [*case.prompts, *[OCEAN] * len(random)]
        theirs = gap(scores_of(reward, shown, words), case.theirs(shown, words))
    found = [value for value in (printed, theirs) if value is not None]
    return Row(
        case.reward,
        revisions,
        "" if printed is None else f"{printed:.2g}",
        "" if theirs is None else f"{theirs:.2g} ({case.package} {metadata.version(case.package)})",
        max(found) <= case.tolerance if found else None,
    )


def installed(package: str) -> bool:
    """Whether a distribution is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def gap(ours: Tensor, theirs: Sequence[float]) -> float:
    """The largest difference."""
    return float((ours - torch.tensor(theirs, dtype=torch.float64)).abs().max())


WORDS = {True: "agrees", False: "DISAGREES", None: "nothing to compare with"}


def table(rows: Sequence[Row]) -> str:
    """The rows in markdown."""
    head = "| reward | weights | from the printed scores | from their code | |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(
        f"| `{r.reward}` | {r.weights} | {r.printed} | {r.theirs} | {WORDS[r.agrees]} |\n" for r in rows
    )


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these rewards, or all."""
    unknown = set(names) - {case.reward for case in CASES}
    if unknown:
        sys.exit(f"check_parity: no case {min(unknown)!r}; there are {', '.join(case.reward for case in CASES)}")
    return [case for case in CASES if not names or case.reward in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", nargs="*", help="those that are compared; all if none is named")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the published pictures")
    parser.add_argument("--output", type=Path, help="where the table is written")
    given = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        random = random_pictures(Path(folder))
        for case in chosen(given.reward):
            try:
                rows.append(compare(case, given.data, random))
            except (RewardError, OSError) as error:
                print(f"check_parity: {case.reward} is left out: {error}", file=sys.stderr)
    print(table(rows))
    if given.output is not None:
        given.output.write_text(table(rows))
    return int(any(row.agrees is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
