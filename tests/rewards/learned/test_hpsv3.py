"""HPSv3 against itself written out from its description, and against transformers' own processor and model, on a small
random checkpoint in the published layout."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from rewards.learned import hpsv3
from rewards.learned.hpsv3 import HPSv3, patches, resized, size_of
from tests.support import checkpoints
from tests.support.qwen2_vl import HPSv3Forward, chat

PROMPTS = ["a red circle", "a blue square left of a red circle on a white background"]
IMAGES = torch.rand(2, 3, 448, 448, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return checkpoints.hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(files):
    return HPSv3(*files)


@pytest.fixture(scope="module")
def written_out(files):
    """In float64, and from no part of the code under test but the question, whose hash is pinned below."""
    return HPSv3Forward(*files, hpsv3.QUESTION)


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
@pytest.mark.parametrize("size", [(100, 150), pytest.param((448, 448), marks=pytest.mark.slow)], ids=str)
def test_scores_are_those_of_the_forward_written_out(size, reward, written_out, files):
    """Pictures as they are and enlarged, prompts of two lengths in one batch; the authors' positions and no others."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    states, scores = reward.hidden(images, PROMPTS), reward(images, PROMPTS)
    expected = torch.stack([written_out.hidden(x, p) for x, p in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(states.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.double(), written_out.score(expected)[:, 0], rtol=0, atol=1e-5)
    other = HPSv3Forward(*files, hpsv3.QUESTION, plain=False).hidden(images[1], PROMPTS[1])
    assert (expected[1] - other).abs().max() > 1  # 1.20 at 448 x 448, 3.26 at 100 x 150; |h| is 0.84 on average
    alone = by_transformers(reward, images[1], PROMPTS[1], plain=False)
    torch.testing.assert_close(alone.double(), other, rtol=0, atol=1e-5)  # which are the model's own


@torch.no_grad()
def test_a_batch_scores_as_one_picture_at_a_time(reward):
    together = reward.hidden(IMAGES, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[i], reward.hidden(IMAGES[i : i + 1], [prompt])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            together[i], by_transformers(reward, IMAGES[i], prompt, plain=True), rtol=0, atol=1e-5
        )


def test_the_chat_is_qwens_template_on_the_authors_turn(reward):
    whole = chat(hpsv3.QUESTION.replace("{prompt}", PROMPTS[0])).replace("<|image_pad|>", "<|image_pad|>" * 3)
    read = reward._text(PROMPTS[0], 3)
    assert whole.startswith(read) and read.endswith("<|Reward|>")


@torch.no_grad()
def test_the_score_is_the_first_output_of_the_head(reward):
    state = {key: value for key, value in reward.head.state_dict().items()}
    x = reward.hidden(IMAGES, PROMPTS).double()
    for i in (0, 2, 4):
        x = x @ state[f"{i}.weight"].double().T + state[f"{i}.bias"].double()
        x = x.relu() if i < 4 else x
    torch.testing.assert_close(reward(IMAGES, PROMPTS), x[:, 0].float())
    assert x.shape == (2, 2)


def test_gradients_are_the_differences_of_the_forward_written_out(reward, written_out):
    """Of pixels before the resize, along one direction: ours in float32 against central differences in float64."""
    image = IMAGES[0, :, :96, :80].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(image[None], PROMPTS[:1]).sum(), image)
    along = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        here, there = (written_out(image.double() + step * along, PROMPTS[0]) for step in (-1e-5, 1e-5))
    slope = ((there - here) / 2e-5).item()
    assert (gradient.double() * along).sum().item() == pytest.approx(slope, rel=1e-4)
    assert abs(slope) > 0.1 and (gradient != 0).all()


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_a_prompt_with_a_mark_of_the_models_own_is_refused(token, reward):
    with pytest.raises(ValueError, match=r"holds <\|.*\|>, which HPSv3 takes for a mark of its own"):
        reward(IMAGES[:1], [f"a {token} circle"])


def test_the_question_is_the_one_that_it_was_trained_on():
    digest = hashlib.sha256(hpsv3.QUESTION.encode()).hexdigest()
    assert (
        digest == "23cf48278597ac038c24c6fb9c0b57090efa0af5f03c7dbdf83ad08a266cb12a"
    )  # of the text in the authors' data_collator_qwen.py
    assert hpsv3.QUESTION.startswith("\nYou are tasked with evaluating a generated image")
    assert hpsv3.QUESTION.count("  \n") == 2 and "best. \n\n" in hpsv3.QUESTION
    assert hpsv3.QUESTION.endswith("- {prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>")
