"""VQAScore by CLIP-FlanT5 against transformers' parts, put together as the authors' code does."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from rewards.learned.clip_t5 import squared
from rewards.registry import load
from tests.support import checkpoints
from tests.support.references import clip_t5_forward

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return checkpoints.clip_t5(tmp_path_factory.mktemp("clip_t5"))


@torch.no_grad()
def test_the_score_is_the_probability_of_the_answer(folders, tmp_path):
    """Of pictures that are padded to the network's size."""
    images = (255 * torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))).round() / 255
    forward, expected = clip_t5_forward(folders), []
    for x, prompt in zip(images, PROMPTS, strict=True):
        Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
        expected.append(forward(tmp_path / "a.png", prompt))
    reward = load("vqascore-clip-flant5", **folders)
    torch.testing.assert_close(reward(images, PROMPTS), torch.stack(expected), rtol=1e-5, atol=1e-7)
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


@torch.no_grad()
def test_a_clip_that_is_a_pickle_alone_is_converted_as_the_refusal_says(folders, tmp_path):
    """As the default picture tower may be published: a whole CLIP, of which the reward takes the picture's part."""
    for name in ("published", "converted"):
        (tmp_path / name).mkdir()
    vision = CLIPVisionModel.from_pretrained(folders["vision"])
    text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=text, vision_config=vision.config.to_dict(), projection_dim=4)
    whole = CLIPModel(config)
    config.save_pretrained(tmp_path / "published")
    torch.save(whole.state_dict(), tmp_path / "published" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"AutoModel.from_pretrained\(MODEL\).save_pretrained\(FOLDER\)"):
        load("vqascore-clip-flant5", **folders | {"vision": tmp_path / "published"})
    AutoModel.from_pretrained(tmp_path / "published").save_pretrained(tmp_path / "converted")
    eyes = load("vqascore-clip-flant5", **folders | {"vision": tmp_path / "converted"}).eyes
    given = whole.vision_model.state_dict()
    found = {name.removeprefix("vision_model."): tensor for name, tensor in eyes.state_dict().items()}
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
