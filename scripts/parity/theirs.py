"""The scores that a reward's own authors' code gives, where its package is installed: files and prompts -> scores."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rewards import hub

Theirs = Callable[[Sequence[Path], Sequence[str]], list[float]]
V1_HEAD = Path(__file__).parents[2] / "tests" / "data" / "laion-v1" / "sa_0_4_vit_l_14_linear.pth"


def image_reward(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", device="cpu")
    return [float(model.score(prompt, str(file))) for file, prompt in zip(files, prompts, strict=True)]


def cycle_reward(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    from cyclereward import cyclereward

    model, look = cyclereward(device="cpu", model_type="CycleReward-Combo")
    return [float(model.score(look(picture(f))[None], p)) for f, p in zip(files, prompts, strict=True)]


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


def lpips(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    """Minus the distance to the first file, which is as large as the others."""
    from lpips import LPIPS, im2tensor

    network = LPIPS(net="alex")
    first, *_ = shown = [im2tensor(pixels(file)) for file in files]
    return [-float(network(x, first)) for x in shown]


def clip_flan_t5(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    from t2v_metrics import VQAScore

    score = VQAScore(model="clip-flant5-xl")
    return [float(score(images=[str(f)], texts=[p])) for f, p in zip(files, prompts, strict=True)]


# ------------------------------------------------------------------------------------------------ by CLIP's own code


def transformers_clip(model: str, processor: str, scaled: bool) -> Theirs:
    """exp(logit_scale) cos, or cos, of a CLIPModel by its own processor, as the cards of CLIP and PickScore do."""

    @torch.no_grad()
    def scores(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        from transformers import AutoModel, AutoProcessor

        network, look = AutoModel.from_pretrained(model).eval(), AutoProcessor.from_pretrained(processor)
        scale = 1.0 if scaled else float(network.logit_scale.exp())
        return [clip_logit(network, look, f, p) / scale for f, p in zip(files, prompts, strict=True)]

    return scores


def clip_logit(model: Any, processor: Any, file: Path, prompt: str) -> float:
    """The logit of a CLIPModel by its own processor, on the picture of a file."""
    given = processor(text=[prompt], images=[picture(file)], return_tensors="pt", padding="max_length",
                      truncation=True, max_length=model.config.text_config.max_position_embeddings)  # fmt: skip
    return float(model(**given).logits_per_image)


@torch.no_grad()
def open_clip_logit(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
    """By open_clip's own transform and tokenizer."""
    import open_clip

    name, tag = "ViT-H-14", "laion2b_s32b_b79k"
    model, _, look = open_clip.create_model_and_transforms(name, tag)
    model, words, found = model.eval(), open_clip.get_tokenizer(name), []
    for file, prompt in zip(files, prompts, strict=True):
        seen = model.encode_image(look(picture(file))[None], normalize=True)
        found.append(float(model.logit_scale.exp() * seen @ model.encode_text(words([prompt]), normalize=True).T))
    return found


def aesthetic(head: str) -> Theirs:
    """The published layers, one after the other, on transformers' picture embedding by CLIP's own processor."""

    @torch.no_grad()
    def scores(files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        from transformers import CLIPModel, CLIPProcessor

        name = "openai/clip-vit-large-patch14"
        model, look = CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name)
        found, weights = [], hub.read(V1_HEAD) if head == "v1" else hub.state(head)
        for file in files:
            seen = model.vision_model(look(images=[picture(file)], return_tensors="pt").pixel_values).pooler_output
            x = model.visual_projection(seen)
            found.append(float(through(x / x.norm(), weights)))
        return found

    return scores


def through(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The linear layers of a state, in the order of their numbers."""
    if weights.keys() == {"weight", "bias"}:
        return x @ weights["weight"].T + weights["bias"]
    for n in sorted({int(name.split(".")[1]) for name in weights}):
        x = x @ weights[f"layers.{n}.weight"].T + weights[f"layers.{n}.bias"]
    return x


def picture(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def pixels(file: Path) -> Any:
    """(H, W, 3) of 8 bits."""
    import numpy as np

    return np.asarray(picture(file))
