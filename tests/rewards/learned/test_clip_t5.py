"""VQAScore by CLIP-FlanT5 against transformers' parts, put together as the authors' code does."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from rewards.learned.clip_t5 import BEFORE, squared
from rewards.registry import load
from tests.support import checkpoints

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return checkpoints.clip_t5(tmp_path_factory.mktemp("clip_t5"))


@torch.no_grad()
def expected(folders, images, prompts):
    """exp(-loss) of the answer "Yes", one picture at a time, the pictures' tokens between two parts of the text."""
    state = load_file(folders["model"] / "model.safetensors")
    t5 = T5ForConditionalGeneration(T5Config.from_pretrained(folders["model"])).eval()
    t5.load_state_dict({k: v for k, v in state.items() if not k.startswith("mm_projector")}, strict=False)
    eyes, words = CLIPVisionModel.from_pretrained(folders["vision"]), AutoTokenizer.from_pretrained(folders["words"])
    w = {k.removeprefix("mm_projector."): v for k, v in state.items() if k.startswith("mm_projector")}
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std)
    )
    found = []
    for x, prompt in zip(images, prompts, strict=True):
        tokens = eyes((x[None] - mean) / std, output_hidden_states=True).hidden_states[-2][0, 1:]
        tokens = torch.nn.functional.gelu(tokens @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        question = f'\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
        parts = [t5.shared(torch.tensor(words(text).input_ids)) for text in (BEFORE, question)]
        read = torch.cat([parts[0], tokens, parts[1]])[None]
        found.append((-t5(inputs_embeds=read, labels=torch.tensor([words("Yes").input_ids])).loss).exp())
    return torch.stack(found)


def test_the_score_is_the_probability_of_the_answer(folders):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reward = load("vqascore-clip-flant5", **folders)
    torch.testing.assert_close(reward(images, PROMPTS), expected(folders, images, PROMPTS), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="does not say where the prompt stands"):
        load("vqascore-clip-flant5", **folders, question="Is it good?")


@pytest.mark.parametrize("size", [(6, 10), (9, 4), (5, 5)])
def test_pictures_are_padded_with_the_mean_colour(size):
    """As expand2square of the authors' code."""
    x = (255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))).round() / 255
    height, width = size
    side = max(size)
    page = Image.new("RGB", (side, side), tuple(int(v * 255) for v in CLIPImageProcessor().image_mean))
    picture = Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy())
    page.paste(picture, ((side - width) // 2, (side - height) // 2))
    wanted = torch.tensor(list(page.tobytes())).view(side, side, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(squared(x[None])[0], wanted, rtol=0, atol=1e-6)
