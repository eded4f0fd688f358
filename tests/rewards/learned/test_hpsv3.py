"""HPSv3 against transformers' own processor and model, on a small random checkpoint in the published layout."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from rewards.learned import hpsv3
from rewards.learned.hpsv3 import HPSv3, patches, resized, size_of
from tests.support import checkpoints

PROMPTS = ["a red circle", "a blue square left of a red circle on a white background"]
IMAGES = torch.rand(2, 3, 448, 448, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    weights, base = checkpoints.hpsv3(tmp_path_factory.mktemp("hpsv3"))
    return HPSv3(weights, base)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((512, 512), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((64, 64), (448, 448)),
        ((450, 440), (448, 448)),
        ((448, 448), (448, 448)),
        ((512, 768), (364, 532)),
        ((832, 1216), (364, 532)),
        ((768, 512), (532, 364)),
        ((1024, 576), (588, 336)),
        ((300, 450), (392, 560)),
    ],
)
def test_sizes_are_those_of_the_authors_processor(given, expected):
    assert size_of(*given) == expected


def test_a_picture_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="a picture of 201 x 1 pixels is too long for HPSv3"):
        size_of(1, 201)


def test_patches_are_those_of_transformers_processor():
    """For a picture that needs no resize, so that rounding plays no part."""
    x = (255 * IMAGES[:, :, :364, :420]).round() / 255
    looks = Qwen2VLImageProcessor(size={"shortest_edge": 364 * 420, "longest_edge": 364 * 420})
    found = looks(images=[picture for picture in x], do_rescale=False, do_resize=False, return_tensors="pt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (looks.image_mean, looks.image_std))
    made, grid = patches((x - mean) / std)
    assert torch.equal(grid, found.image_grid_thw)
    torch.testing.assert_close(made, found.pixel_values, rtol=0, atol=1e-5)


def test_the_resize_is_near_to_pillows():
    smooth = torch.nn.functional.interpolate(IMAGES[:1, :, :32, :32], (512, 512), mode="bicubic").clamp(0, 1)
    picture = Image.fromarray((255 * smooth[0]).round().byte().permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.asarray(picture.resize((448, 448), Image.BICUBIC)) / 255).permute(2, 0, 1)
    std = torch.tensor(hpsv3.CLIP_STD).view(3, 1, 1)
    mean = torch.tensor(hpsv3.CLIP_MEAN).view(3, 1, 1)
    assert ((resized(smooth)[0] * std + mean) - expected).abs().mean() < 0.002


def by_transformers(reward, image, prompt, plain: bool) -> torch.Tensor:
    """The hidden state at the reward token, by the model's own forward on one picture with the whole chat."""
    pixels, grid = patches(resized(image[None]))
    text = f"{reward._text(prompt, len(pixels) // 4)}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([reward.tokenizer.encode(text, add_special_tokens=False)])
    at = ids[0].tolist().index(reward._id("<|Reward|>"))
    kinds = (ids == reward._id("<|image_pad|>")).int()
    order = torch.arange(ids.shape[1]).expand(3, 1, -1) if plain else None
    found = reward.model(
        input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, position_ids=order
    )
    return found.last_hidden_state[0, at]


@torch.no_grad()
def test_hidden_states_are_those_of_the_model_with_plain_positions(reward):
    """A batch of prompts of two lengths against one at a time; what comes after the token changes nothing."""
    together = reward.hidden(IMAGES, PROMPTS)
    for image, prompt, found in zip(IMAGES, PROMPTS, together, strict=True):
        torch.testing.assert_close(found, by_transformers(reward, image, prompt, plain=True), rtol=0, atol=1e-5)
        other = by_transformers(reward, image, prompt, plain=False)  # as transformers numbers the picture's tokens
        assert (found - other).abs().max() > 1e-2


@torch.no_grad()
def test_the_score_is_the_first_output_of_the_head(reward):
    state = {key: value for key, value in reward.head.state_dict().items()}
    x = reward.hidden(IMAGES, PROMPTS).double()
    for i in (0, 2, 4):
        x = x @ state[f"{i}.weight"].double().T + state[f"{i}.bias"].double()
        x = x.relu() if i < 4 else x
    torch.testing.assert_close(reward(IMAGES, PROMPTS), x[:, 0].float())
    assert x.shape == (2, 2)


def test_gradients_reach_the_pixels(reward):
    images = IMAGES[:, :, :96, :80].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    step = 1e-2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        change = reward((images + step), PROMPTS).sum() - reward((images - step), PROMPTS).sum()
    assert change.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.05)


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_a_prompt_with_a_mark_of_the_models_own_is_refused(token, reward):
    with pytest.raises(ValueError, match=r"holds <\|.*\|>, which HPSv3 takes for a mark of its own"):
        reward(IMAGES[:1], [f"a {token} circle"])


def test_the_question_is_the_one_that_it_was_trained_on():
    assert hpsv3.QUESTION.startswith("\nYou are tasked with evaluating a generated image")
    assert hpsv3.QUESTION.count("  \n") == 2 and "best. \n\n" in hpsv3.QUESTION
    assert hpsv3.QUESTION.endswith("- {prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>")
