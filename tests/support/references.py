"""Small random checkpoints of the layouts that rewards are published in, each with a forward that is not ours.

A forward reads a picture's file with Pillow, prepares it with torchvision or by a formula of its own, and runs the
model of another library, or one that is written out; it shares no code with `rewards`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support import checkpoints
from tests.support.qwen2_vl import MEAN, STD, HPSv3Forward

Forward = Callable[[Path, str], Tensor]  # a picture's file and a prompt -> its score, ()
SIDE = 32  # of a picture as the small networks see it


class Checkpoint(NamedTuple):
    """What makes our reward, and what it is compared with."""

    options: Mapping[str, Any]  # of `rewards.registry.load`
    forward: Forward
    against: str  # in words
    side: int = SIDE  # of the pictures, in pixels: as the network sees them, so that no resize is compared
    hub: Path | None = None  # a model's folder in place of the Hub's


def shown(file: Path) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    with Image.open(file) as image:
        return transforms.functional.to_tensor(image.convert("RGB"))[None]


def cropped(file: Path) -> Tensor:
    """As CLIP, ImageReward and the aesthetic predictors prepare a picture."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(SIDE, bicubic), transforms.CenterCrop(SIDE), transforms.ToTensor()]
    with Image.open(file) as image:
        return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(image.convert("RGB"))[None]


def on_black(file: Path) -> Tensor:
    """As HPS prepares a picture."""
    with Image.open(file) as image:
        scale = SIDE / max(image.size)
        small = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    page = Image.new("RGB", (SIDE, SIDE))
    page.paste(small, tuple((SIDE - side) // 2 for side in small.size))
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(page)[None]


def ids_of(prompt: str) -> Tensor:
    """CLIP's tokens, in a context of 16."""
    return open_clip.SimpleTokenizer(context_length=16)([prompt])


# ------------------------------------------------------------------------------------------------ CLIP


def transformers_clip(folder: Path, scaled: bool) -> Checkpoint:
    """PickScore's layout, and OpenAI's CLIP's."""
    file = checkpoints.clip_file(folder)
    model = CLIPModel(CLIPConfig(**checkpoints.CLIP_SIZES)).eval()
    model.load_state_dict(load_file(file), strict=False)

    def forward(picture: Path, prompt: str) -> Tensor:
        logit = model(pixel_values=cropped(picture), input_ids=ids_of(prompt)).logits_per_image.squeeze()
        return logit if scaled else logit / model.logit_scale.exp()

    return Checkpoint({"weights": file, "sizes": checkpoints.CLIP_SIZES}, forward, "transformers' CLIPModel")


def hps(folder: Path) -> Checkpoint:
    model = checkpoints.open_clip_model()

    def forward(picture: Path, prompt: str) -> Tensor:
        seen = model.encode_image(on_black(picture), normalize=True)
        return (seen @ model.encode_text(ids_of(prompt), normalize=True).T).squeeze()

    options = {"weights": checkpoints.hps_file(folder), "sizes": checkpoints.CLIP_SIZES}
    return Checkpoint(options, forward, "open_clip's CLIP, Pillow's padding")


def of_open_clip(folder: Path, scaled: bool) -> Checkpoint:
    """A model in open_clip's own format."""
    checkpoints.open_clip_folder(folder)
    model, _, look = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model, words = model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")

    def forward(picture: Path, prompt: str) -> Tensor:
        with Image.open(picture) as image:
            seen = model.encode_image(look(image)[None], normalize=True)
        cosine = (seen @ model.encode_text(words([prompt]), normalize=True).T).squeeze()
        return cosine * model.logit_scale.exp() if scaled else cosine

    return Checkpoint({}, forward, "open_clip's model and transform", model.visual.image_size[0], folder)


def aesthetic(folder: Path, head: nn.Module, file: Path) -> Checkpoint:
    """A head on CLIP's picture embedding of unit length."""
    clip = transformers_clip(folder, False)
    model = CLIPModel(CLIPConfig(**checkpoints.CLIP_SIZES)).eval()
    model.load_state_dict(load_file(clip.options["weights"]), strict=False)

    def forward(picture: Path, prompt: str) -> Tensor:
        features = model.visual_projection(model.vision_model(pixel_values=cropped(picture)).pooler_output)
        return head(features / features.norm()).squeeze()

    return Checkpoint({**clip.options, "predictor": file}, forward, "transformers' CLIPModel, the layers in torch")


def aesthetic_v2(folder: Path) -> Checkpoint:
    return aesthetic(folder, checkpoints.aesthetic_model(), checkpoints.aesthetic_file(folder))


def aesthetic_v1(folder: Path) -> Checkpoint:
    head = checkpoints.lively(nn.Linear(8, 1))
    torch.save(head.state_dict(), folder / "linear.pth")
    return aesthetic(folder, head, folder / "linear.pth")


# ------------------------------------------------------------------------------------------------ BLIP


def blip(
    folder: Path, numbers: Sequence[int], between: Callable[[Tensor], Tensor], mean: float, std: float
) -> Checkpoint:
    """ImageReward's and CycleReward's layout: BLIP's text encoder over the picture, and a head of five layers."""
    weights, vocabulary = checkpoints.image_reward(folder, numbers)
    eyes = checkpoints.lively(BlipVisionModel(BlipVisionConfig(**checkpoints.BLIP_VISION)))
    reader = checkpoints.lively(BlipTextModel(BlipTextConfig(**checkpoints.BLIP_TEXT), add_pooling_layer=False))
    state, words = torch.load(weights, weights_only=True), BertTokenizer(str(vocabulary))

    def forward(picture: Path, prompt: str) -> Tensor:
        seen = eyes(pixel_values=cropped(picture)).last_hidden_state
        read = words([prompt], return_tensors="pt")
        states = reader(input_ids=read.input_ids, attention_mask=read.attention_mask, encoder_hidden_states=seen)
        x = states.last_hidden_state[0, 0]
        for n in numbers:
            x = F.linear(between(x) if n else x, state[f"mlp.layers.{n}.weight"], state[f"mlp.layers.{n}.bias"])
        return (x.squeeze() - mean) / std

    options = {"weights": weights, "vocabulary": vocabulary}
    options |= {"vision": checkpoints.BLIP_VISION, "text": checkpoints.BLIP_TEXT}
    return Checkpoint(options, forward, "transformers' BLIP, the layers in torch")


def image_reward(folder: Path) -> Checkpoint:
    return blip(folder, (0, 2, 4, 6, 7), lambda x: x, 0.16717362830052426, 1.0333394966054072)


def cycle_reward(folder: Path) -> Checkpoint:
    return blip(folder, (0, 2, 4, 6, 8), F.gelu, 0.0, 1.0)


# ------------------------------------------------------------------------------------------------ others


def hpsv3(folder: Path) -> Checkpoint:
    from rewards.learned.hpsv3 import QUESTION  # the authors' text

    weights, base = checkpoints.hpsv3(folder)
    forward = HPSv3Forward(weights, base, QUESTION)
    return Checkpoint(
        {"weights": weights, "base": base},
        lambda picture, prompt: forward(shown(picture)[0], prompt),
        "its description, written out in float64",
        side=100,
    )


def lpips_distance(x: Tensor, y: Tensor, heads: Sequence[Tensor]) -> Tensor:
    """As lpips 0.1.4: scaled, the outputs of five slices of `features`, unit length, squared, weighed, averaged."""
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    features, total = checkpoints.alexnet_model().features, torch.zeros(())
    a, b = ((2 * z - 1 - shift) / scale for z in (x, y))
    for head, (begin, end) in zip(heads, [(0, 2), (2, 5), (5, 8), (8, 10), (10, 12)], strict=True):
        a, b = features[begin:end](a), features[begin:end](b)
        units = [z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b)]
        total = total + ((units[0] - units[1]) ** 2 * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


def lpips(folder: Path) -> Checkpoint:
    from rewards.learned.lpips import HEADS  # the published heads, which are bundled

    rows, columns = np.mgrid[:64, :64] * 4
    Image.fromarray(np.stack([rows, columns, 255 - rows], -1).astype(np.uint8)).save(folder / "a.png")
    heads = load_file(HEADS)

    def forward(picture: Path, prompt: str) -> Tensor:
        return -lpips_distance(shown(picture), shown(folder / "a.png"), [heads[f"lin{i}"] for i in range(5)]).squeeze()

    options = {"weights": checkpoints.alexnet_file(folder), "reference": folder / "a.png"}
    return Checkpoint(options, forward, "lpips' formula on torchvision's AlexNet", side=64)


BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '


def clip_t5_forward(folders: Mapping[str, Path]) -> Forward:
    """exp(-loss) of the answer "Yes" of T5, the picture's tokens between two parts of the text."""
    state = load_file(folders["model"] / "model.safetensors")
    t5 = T5ForConditionalGeneration(T5Config.from_pretrained(folders["model"])).eval()
    t5.load_state_dict({k: v for k, v in state.items() if not k.startswith("mm_projector")}, strict=False)
    eyes, words = CLIPVisionModel.from_pretrained(folders["vision"]), AutoTokenizer.from_pretrained(folders["words"])
    w = {k.removeprefix("mm_projector."): v for k, v in state.items() if k.startswith("mm_projector")}

    def forward(picture: Path, prompt: str) -> Tensor:
        with Image.open(picture) as image:
            page = Image.new("RGB", (max(image.size),) * 2, tuple(int(mean * 255) for mean in MEAN))
            page.paste(image, tuple((max(image.size) - side) // 2 for side in image.size))
        steps = [transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC), transforms.ToTensor()]
        x = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(page)[None]
        tokens = eyes(x, output_hidden_states=True).hidden_states[-2][0, 1:]
        tokens = F.gelu(tokens @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        parts = [t5.shared(torch.tensor(words(text).input_ids)) for text in (BEFORE, AFTER.format(prompt))]
        read = torch.cat([parts[0], tokens, parts[1]])[None]
        return (-t5(inputs_embeds=read, labels=torch.tensor([words("Yes").input_ids])).loss).exp()

    return forward


def clip_t5(folder: Path) -> Checkpoint:
    folders = checkpoints.clip_t5(folder)
    return Checkpoint(folders, clip_t5_forward(folders), "transformers' T5 and CLIP, put together as its authors do")


CHECKPOINTS: dict[str, Callable[[Path], Checkpoint]] = {
    "clip-score": lambda folder: transformers_clip(folder, False),
    "open-clip": lambda folder: of_open_clip(folder, False),
    "clip": lambda folder: of_open_clip(folder, True),
    "pickscore": lambda folder: transformers_clip(folder, True),
    "hps-v2": hps,
    "hps-v2.1": hps,
    "hps-v3": hpsv3,
    "imagereward": image_reward,
    "cyclereward": cycle_reward,
    "aesthetic": aesthetic_v2,
    "aesthetic-ava": aesthetic_v2,
    "aesthetic-v1": aesthetic_v1,
    "lpips": lpips,
    "vqascore-clip-flant5": clip_t5,
}
