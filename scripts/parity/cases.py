"""The published checkpoints, the pictures that they are compared on, and what is known of their scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from parity import theirs
from parity.theirs import Theirs

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
FOUR = ("1.webp", "2.webp", "3.webp", "4.webp")
OCEANS = (OCEAN,) * 4
VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def softmax(scores: Tensor) -> Tensor:
    """The probabilities of several prompts for one picture, from cosines, as CLIP's README prints them."""
    return (100 * scores).softmax(0)


class Case(NamedTuple):
    """A published checkpoint: pictures, prompts, and what is known of their scores."""

    reward: str  # with its options
    package: str = ""  # theirs
    theirs: Theirs | None = None
    tolerance: float = 0.02
    pictures: Sequence[str] = FOUR
    prompts: Sequence[str] = OCEANS
    printed: Sequence[float] = ()  # by its authors, of these pictures and prompts
    of_scores: Callable[[Tensor], Tensor] = lambda scores: scores  # what they print of the scores
    options: Mapping[str, str] = {}  # of the reward that are pictures

    @property
    def name(self) -> str:
        return self.reward.partition("[")[0]


CASES = [
    Case(
        "imagereward", "image-reward", theirs.image_reward,
        printed=(0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492),
    ),
    Case(
        "open-clip[model=ViT-B-32-quickgelu, pretrained=openai]", tolerance=0.002, pictures=("CLIP.png",) * 3,
        prompts=("a diagram", "a dog", "a cat"), printed=(0.9927937, 0.00421068, 0.00299572), of_scores=softmax,
    ),
    Case("clip", "open-clip-torch", theirs.open_clip_logit, 0.1),
    Case("clip-score", "transformers", theirs.transformers_clip(VIT_L, VIT_L, False), 0.001),
    Case("pickscore", "transformers", theirs.transformers_clip("yuvalkirstain/PickScore_v1", VIT_H, True)),
    Case("hps-v2", "hpsv2", theirs.hps_v2("v2.0"), 0.002),
    Case("hps-v2.1", "hpsv2", theirs.hps_v2("v2.1"), 0.002),
    Case("hps-v3", "hpsv3", theirs.hps_v3, 0.05),
    Case("cyclereward", "cyclereward", theirs.cycle_reward),
    Case("aesthetic", "transformers", theirs.aesthetic("aesthetic-v2-sac")),
    Case("aesthetic-ava", "transformers", theirs.aesthetic("aesthetic-v2-ava")),
    Case("aesthetic-v1", "transformers", theirs.aesthetic("v1")),
    Case("lpips", "lpips", theirs.lpips, 0.001, options={"reference": "1.webp"}),
    Case("vqascore-clip-flant5", "t2v-metrics", theirs.clip_flan_t5),
]  # fmt: skip
