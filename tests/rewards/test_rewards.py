"""What every reward owes, on all of them, and each one's own formula by another implementation."""

import ast
import io
import subprocess
import sys
import types
from importlib import util
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.fft import dctn

import rewards
from difftune import evaluation
from rewards import jpeg
from rewards.learned import clip, ocr
from rewards.registry import REWARDS, load, register
from rewards.world import draw, grammar
from rewards.world.oracle import Oracle
from rewards.world.render import Scene, Thing, render

PROMPTS = ["a red circle", "a blue square", "a red square"]
SPECIAL = {  # what these want of a prompt
    "position": [f"a red circle {where} a blue square" for where in ("left of", "above", "right of")],
    "classifier": ["cat", "dog", "mouse"],
    "ocr": ['a sign "one"', 'a sign "two"', 'a sign "three"'],
}
NEEDS = {"ocr": "rapidocr", "pyiqa": "pyiqa", "torchmetrics": "torchmetrics"}
NAMES = [name for name in REWARDS if name not in NEEDS or util.find_spec(NEEDS[name])]
READS = [pytest.param(name, marks=pytest.mark.slow) if name == "ocr" else name for name in NAMES]  # it takes seconds
DIFFERENTIABLE = [name for name in NAMES if REWARDS[name].differentiable]


def prompts(name: str) -> list[str]:
    return SPECIAL.get(name, PROMPTS)


@pytest.mark.parametrize("name", NEEDS)
def test_reward_of_an_extra_is_in_the_family(name):
    if name not in NAMES:
        pytest.skip(f"reward {name!r} needs the package {NEEDS[name]!r}, which is not installed")
    assert REWARDS[name].extra


def noise_images(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def picture(scene: Scene, size: int = 64) -> torch.Tensor:
    return torch.from_numpy(render(scene, size)).permute(2, 0, 1)


SCENE = Scene("white", (Thing("circle", "red", 16, 30, 10), Thing("square", "blue", 46, 36, 10)))
TRUE = "a red circle left of a blue square on a white background"


def scene(*things: Thing) -> torch.Tensor:
    return picture(Scene("white", things))


def lettering(text: str) -> torch.Tensor:
    """Black letters on white, (3, 96, 256)."""
    page = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(page).text((30, 15), text, fill="black", font=ImageFont.load_default(size=56))
    return torch.from_numpy(np.asarray(page) / 255).permute(2, 0, 1).float()


def gray(value: float) -> torch.Tensor:
    return torch.full((3, 64, 64), value)


CIRCLE, BLUE = Thing("circle", "red", 32, 32, 12), Thing("circle", "blue", 32, 32, 12)
NOISE = noise_images(1, 64)[0]
BETTER = {  # a better picture, a worse one, and the prompt
    "oracle": lambda: (picture(SCENE), scene(CIRCLE), TRUE),
    "object-count": lambda: (picture(SCENE), scene(CIRCLE), TRUE),
    "coverage": lambda: (picture(SCENE), NOISE, ""),
    "position": lambda: (picture(SCENE), picture(SCENE).flip(2), TRUE),
    "tiny-clip": lambda: (scene(CIRCLE), scene(BLUE), "a red circle on a white background"),
    "tiny-classifier": lambda: (scene(CIRCLE), scene(BLUE), "a red circle"),
    "jpeg": lambda: (NOISE, gray(0.5), ""),
    "jpeg-proxy": lambda: (NOISE, gray(0.5), ""),
    "brightness": lambda: (gray(0.9), gray(0.1), ""),
    "colorfulness": lambda: (NOISE, gray(0.5), ""),
    "symmetry": lambda: (gray(0.5), NOISE, ""),
    "ocr": lambda: (lettering("HELLO"), lettering("WORLD"), 'a sign that says "HELLO"'),
    "saturation": lambda: (scene(CIRCLE), gray(0.5), ""),
    "contrast": lambda: (NOISE, gray(0.5), ""),
}
DOWNLOADED = {  # or the user's own model, or another reward
    "clip-score", "clip", "open-clip", "pickscore", "hps-v2", "hps-v2.1", "hps-v3", "imagereward", "cyclereward",
    "aesthetic", "aesthetic-ava", "aesthetic-v1",
    "classifier", "vlm", "vqascore", "soft-tifa", "text-exemplar", "judge", "remote", "smooth", "lpips", "pyiqa",
    "torchmetrics", "vqascore-clip-flant5",
}  # fmt: skip
WITH_DTYPE = DOWNLOADED - {"text-exemplar", "remote", "smooth", "judge", "pyiqa", "torchmetrics"}
WITHOUT_PREPROCESS = {"vlm", "vqascore", "vqascore-clip-flant5", "soft-tifa", "hps-v3", "lpips"}
SEEN = (WITH_DTYPE | {"tiny-clip", "tiny-classifier"}) - WITHOUT_PREPROCESS
ROUGH = {"pickscore": 10.0}  # cosines times exp(logit_scale)


# ---------------------------------------------------------------------------------------------- every reward


@pytest.mark.parametrize("name", READS)
@pytest.mark.sampled(3)
def test_each_image_is_scored_by_itself(name, loaded):
    """Scores (B,) in float32 that do not depend on the rest of the batch or its order, nor change the second time."""
    reward, images, words = loaded(name), noise_images(), prompts(name)
    scores = reward(images, words)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
    alone = torch.cat([reward(images[i : i + 1], words[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)
    order = [2, 0, 1]
    shuffled = reward(images[order], [words[i] for i in order])
    torch.testing.assert_close(scores[order], shuffled, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores, reward(images, words))


@pytest.mark.parametrize("name", READS)
@pytest.mark.sampled(3)
def test_scores_are_float32_from_images_of_any_float_dtype(name, loaded):
    reward, words = loaded(name), prompts(name)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        images = noise_images().to(dtype)
        scores = reward(images, words)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, reward(images.float(), words), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", READS)
@pytest.mark.sampled(3)
def test_a_picture_that_is_not_finite_has_no_score(name, bad, loaded):
    """NaN for it, so that a model that diverged is not rewarded; the others of the batch have theirs."""
    reward, images, words = loaded(name), noise_images(), prompts(name)
    before = reward(images, words)
    images[1, 0, 5, 5] = bad
    after = reward(images, words)
    assert after.dtype == torch.float32 and after[1].isnan()
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["brightness", "colorfulness", "saturation", "contrast", "symmetry", "jpeg", "jpeg-proxy"]
)
def test_pixels_beyond_black_and_white_score_as_a_screen_shows_them(name):
    """A decoder may overshoot: -0.2 is black, and 1.2 is white."""
    reward, images = load(name), noise_images() * 1.4 - 0.2
    torch.testing.assert_close(reward(images, [""] * 3), reward(images.clamp(0, 1), [""] * 3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(16, 16), (48, 48)])
@pytest.mark.sampled(3)
def test_black_white_and_noise_have_finite_scores(name, size, loaded):
    images = torch.stack([torch.zeros(3, *size), torch.ones(3, *size), noise_images(1, size[0])[0]]).requires_grad_()
    scores = loaded(name)(images, prompts(name))
    assert scores.isfinite().all()
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name in SEEN])
@pytest.mark.parametrize("size", [16, 32, 100])
def test_grey_is_one_half_before_it_is_normalised(name, size, loaded):
    preprocess = loaded(name).preprocess
    pixels = preprocess.pixels(torch.full((1, 3, size, size), 0.5, dtype=torch.bfloat16))
    torch.testing.assert_close(pixels, torch.full_like(pixels, 0.5))
    mean, std = (torch.tensor(list(x)).view(1, 3, 1, 1) for x in (preprocess.mean, preprocess.std))
    half = preprocess(torch.full((1, 3, size, size), 0.5)) * std + mean
    torch.testing.assert_close(half, torch.full_like(half, 0.5))


@pytest.mark.parametrize("name", [name for name in BETTER if name in NAMES])
def test_better_picture_has_the_higher_score(name):
    """For rewards whose weights are here or that need none."""
    better, worse, prompt = BETTER[name]()
    scores = load(name)(torch.stack([better, worse]), [prompt] * 2)
    assert scores[0] > scores[1]


def test_every_reward_that_needs_no_download_has_a_better_picture():
    assert set(BETTER) == set(REWARDS) - DOWNLOADED


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name in WITH_DTYPE])
def test_weights_in_bfloat16_give_nearly_the_same_score(name, loaded, options):
    """Within a few roundings of bfloat16 (8 bits) of the spread of the scores; and a gradient."""
    arguments = options.get(name, {})
    images = noise_images(3, 32).requires_grad_()
    exact = loaded(name)(images, prompts(name))
    rough = load(name, **arguments, dtype="bfloat16")(images, prompts(name))
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1 * ROUGH.get(name, 1.0))
    (gradient,) = torch.autograd.grad(rough.sum(), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_parts_and_checkpointing_change_nothing(name, loaded, options):
    images = noise_images().requires_grad_()
    whole = loaded(name)(images, prompts(name))
    parts = load(name, 2, True, **options.get(name, {}))(images, prompts(name))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(scores.sum(), images)[0] for scores in (whole, parts)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_entry_tells_the_truth(name, loaded):
    entry, reward = REWARDS[name], loaded(name)
    assert reward.differentiable == entry.differentiable
    images = noise_images().requires_grad_()
    scores = reward(images, prompts(name))
    assert scores.requires_grad == entry.differentiable
    if entry.differentiable:
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert (gradient.flatten(1).norm(dim=1) > 0).all()
    if name not in DOWNLOADED:
        low, high = entry.range
        assert ((low <= scores) & (scores <= high)).all()
    assert "\n" not in entry.summary


@pytest.mark.parametrize("name", [name for name in NAMES if not REWARDS[name].needs_prompt])
def test_prompt_is_not_looked_at_where_none_is_needed(name, loaded):
    reward = loaded(name)
    assert torch.equal(reward(noise_images(), PROMPTS), reward(noise_images(), [""] * 3))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_is_the_finite_difference(name, loaded):
    reward, images = loaded(name), noise_images().requires_grad_()
    words, step = prompts(name), 0.005 if name in DOWNLOADED or name in ("jpeg-proxy", "tiny-classifier") else 0.01
    (gradient,) = torch.autograd.grad(reward(images, words).sum(), images)
    along = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        slope = (reward(images + step * along, words) - reward(images - step * along, words)) / (2 * step)
    torch.testing.assert_close(slope, gradient.flatten(1).norm(dim=1), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("words", [["a red circle"], "abc"])
def test_images_and_prompts_must_pair(name, words, loaded):
    with pytest.raises(ValueError, match="3 images need a list of 3 prompts"):
        loaded(name)(noise_images(), words)


@pytest.mark.parametrize("name", NAMES)
def test_single_image_without_a_batch_is_refused(name, loaded):
    with pytest.raises(ValueError, match=r"images are \(B, 3, H, W\) in \[0, 1\], not \(3, 16, 16\)"):
        loaded(name)(noise_images()[0], PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_another_range_or_of_integers_are_refused(name, loaded):
    reward, words = loaded(name), prompts(name)
    with pytest.raises(ValueError, match=r"images are in \[0, 1\], not from -[\d.]+ to [\d.]+: \(x \+ 1\) / 2 brings"):
        reward(2 * noise_images() - 1, words)
    with pytest.raises(ValueError, match=r"images are in \[0, 1\], not from 0\.\d+ to 255: "):
        reward(255 * noise_images(), words)
    with pytest.raises(ValueError, match=r"images are floats in \[0, 1\], not torch.uint8: divide"):
        reward((255 * noise_images()).byte(), words)


# ---------------------------------------------------------------------------------------------- the registry


def test_listing_imports_nothing_heavy():
    code = "import sys, rewards.registry; print([m for m in ('torch', 'numpy', 'PIL', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


EXTRAS = {"rapidocr", "onnxruntime", "pyiqa", "torchmetrics", "piq", "lpips", "hpsv2", "hpsv3", "ImageReward"}


def test_no_reward_imports_an_extra_before_it_is_made():
    """So that all live in one process of one environment, whichever of the extras are installed."""
    for file in sorted(Path(rewards.__file__).parent.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {a.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {(n.module or "").partition(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not names & EXTRAS, (file, names & EXTRAS)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("tiny-clp", {}, r"no reward 'tiny-clp' \(did you mean 'tiny-clip'\?\); known: aesthetic, .*"),
        ("xyz", {}, r"no reward 'xyz'; known: aesthetic, "),
        ("jpeg", {"qualty": 9}, r"no option of reward 'jpeg' 'qualty' \(did you mean 'quality'\?\); known: quality"),
        ("oracle", {"a": 1}, r"no option of reward 'oracle' 'a'; known: none"),
    ],
)
def test_unknown_name_or_option_suggests_the_nearest(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(name, **options)


def test_reward_of_ones_own(monkeypatch):
    monkeypatch.setattr("rewards.registry.REWARDS", dict(REWARDS))

    class Red:
        differentiable = True

        def __call__(self, images, prompts):
            return images[:, 0].mean(dim=(1, 2))

    facts = {"needs_prompt": False, "differentiable": True, "range": (0, 1)}
    assert register("red", "mean of the red channel", **facts)(Red) is Red
    assert torch.equal(load("red")(noise_images(), PROMPTS), noise_images()[:, 0].mean(dim=(1, 2)))
    with pytest.raises(ValueError, match="there is a reward 'jpeg' already"):
        register("jpeg", "another", **facts)(Red)


# ---------------------------------------------------------------------------------------------- each by itself


@pytest.mark.parametrize("quality", [95, 40])
def test_jpeg_is_pillows_file_size(quality, tmp_path):
    images = noise_images(2, 32)
    for score, image in zip(load("jpeg", quality=quality)(images, PROMPTS[:2]), images, strict=True):
        pixels = np.rint(255 * image.permute(1, 2, 0).numpy()).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=quality)
        assert score.item() == pytest.approx((tmp_path / "image.jpg").stat().st_size / 1000, abs=1e-6)


def test_pixels_beyond_white_and_black_are_clipped_for_eight_bits():
    images = 1.4 * noise_images() - 0.2
    assert torch.equal(load("jpeg")(images, PROMPTS), load("jpeg")(images.clamp(0, 1), PROMPTS))


def test_brightness_is_the_distance_from_its_target():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (0.0, 0.25, 1.0)])
    torch.testing.assert_close(load("brightness")(images, PROMPTS), torch.tensor([-1.0, -0.75, 0.0]))
    torch.testing.assert_close(load("brightness", target=0.5)(images, PROMPTS), torch.tensor([-0.5, -0.25, -0.5]))


def hasler(image: np.ndarray) -> float:
    """Hasler and Suesstrunk's M^(3) of an (H, W, 3) picture in [0, 1], as it is usually written in numpy."""
    r, g, b = np.moveaxis(255 * image.astype(np.float64), 2, 0)
    rg, yb = r - g, 0.5 * (r + g) - b
    return np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())


def test_colorfulness_agrees_with_numpy():
    images = noise_images(3, 24) * torch.tensor([1.0, 0.5, 0.2]).view(1, 3, 1, 1)
    expected = [hasler(image.permute(1, 2, 0).numpy()) for image in images]
    np.testing.assert_allclose(load("colorfulness")(images, PROMPTS).numpy(), expected, rtol=1e-5)


def test_colorfulness_of_pure_red_by_hand():
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    expected = 0.3 * 255 * (1 + 0.5**2) ** 0.5
    torch.testing.assert_close(load("colorfulness")(red, [""]), torch.tensor([expected]))


def test_colorfulness_of_gray_is_zero_with_zero_gradient():
    gray = torch.full((1, 3, 8, 8), 0.4, requires_grad=True)
    score = load("colorfulness")(gray, [""])
    (gradient,) = torch.autograd.grad(score.sum(), gray)
    assert score.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_jpeg_proxy_follows_the_size_of_the_file():
    """Over pictures from flat to noise: correlated, and within a half of the size where it is more than the header."""
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for side in (2, 4, 8, 16, 32, 64):
        for contrast in (0.1, 0.5, 1.0):
            coarse = torch.rand(1, 3, side, side, generator=generator)
            pictures.append(0.5 + contrast * (torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear") - 0.5))
    images, words = torch.cat(pictures), [""] * len(pictures)
    for quality, correlation in ((95, 0.98), (75, 0.97), (40, 0.94)):
        size, proxy = (load(name, quality=quality)(images, words) for name in ("jpeg", "jpeg-proxy"))
        assert np.corrcoef(size, proxy)[0, 1] > correlation
        if quality == 95:
            large = size > 1.5
            assert (((proxy - 0.623) / (size - 0.623))[large] - 1).abs().max() < 1 / 2


def test_jpeg_proxy_uses_the_tables_and_the_transform_of_the_encoder():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=60)
    luma, chroma = Image.open(file).quantization.values()
    assert list(luma) == jpeg.quantised(jpeg.LUMA, 60) and list(chroma) == jpeg.quantised(jpeg.CHROMA, 60)
    blocks = torch.rand(1, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = dctn(blocks[0, 0, :, 8:].numpy(), norm="ortho")
    np.testing.assert_allclose(jpeg.dct_blocks(blocks)[0, 0, 0, 1].numpy(), expected, atol=1e-5)
    pixels = (255 * noise_images(1, 16)[0].permute(1, 2, 0)).round().byte().numpy()
    ycc = np.asarray(Image.fromarray(pixels).convert("YCbCr"), np.float32) - 128
    ours = torch.cat(jpeg.ycc(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255), 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, ycc, atol=1.01)
    for name, quality in (("jpeg", 101), ("jpeg-proxy", 0)):
        with pytest.raises(ValueError, match=f"the quality of a JPEG is 1 to 100, not {quality}"):
            load(name, quality=quality)


def test_jpeg_proxy_halves_chroma_as_the_encoder_does():
    """Pixels that differ in colour alone, and not in luma, cost next to nothing in both."""
    odd = (torch.arange(32)[:, None] + torch.arange(32)) % 2 == 1
    red, green = torch.tensor([0.5, 0.2453, 0.3]), torch.tensor([0.2, 0.3981, 0.3])  # of luma 0.3277
    picture = torch.where(odd, red.view(3, 1, 1), green.view(3, 1, 1))[None]
    flat = ((red + green) / 2).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    for name in ("jpeg", "jpeg-proxy"):
        assert abs(load(name)(picture, [""]) - load(name)(flat, [""])) < 0.05
        assert load(name)(torch.where(odd, 0.6, 0.4).expand(1, 3, 32, 32), [""]) > load(name)(flat, [""]) + 0.1


def test_symmetry_is_the_distance_from_the_mirror_image():
    images = torch.zeros(1, 3, 4, 4)
    images[..., :2] = 1  # the left half
    assert load("symmetry")(images, [""]).item() == -1
    assert load("symmetry", mirror="top-bottom")(images, [""]).item() == 0
    assert load("symmetry")(torch.cat([images, images.flip(3)], 3), [""]).item() == 0
    with pytest.raises(ValueError, match="mirrored left-right or top-bottom, not 'around'"):
        load("symmetry", mirror="around")


def test_objects_are_counted_whatever_they_are():
    images = picture(SCENE)[None].expand(3, -1, -1, -1)
    assert load("object-count")(images, [TRUE, "a green triangle", "three red circles"]).tolist() == [0, -1, -1]


def test_position_needs_both_objects_in_their_places():
    images = picture(SCENE)[None].expand(5, -1, -1, -1)
    texts = [TRUE, "a red circle right of a blue square", "a blue square right of a red circle",
             "a red circle left of a green square", "a circle left of a square"]  # fmt: skip
    assert load("position")(images, texts).tolist() == [1, 0, 1, 0, 1]
    third = Thing("triangle", "green", 32, 12, 8)
    crowded = picture(Scene("white", (*SCENE.things, third)))[None]
    assert load("position")(crowded, [TRUE]).item() == 1 and load("oracle")(crowded, [TRUE]).item() == 0
    with pytest.raises(ValueError, match="'a red circle' places nothing: say where"):
        load("position")(images[:1], ["a red circle"])


def test_text_is_compared_without_spaces_and_case():
    assert ocr.edit_distance("kitten", "sitting") == 3
    assert ocr.edit_distance("", "abc") == ocr.edit_distance("abc", "") == 3
    assert ocr.legible("HELLO world", "hello World") == 1
    assert ocr.legible("say hello twice", "Hello") == 1
    assert ocr.legible("hallo", "hello") == pytest.approx(0.8)
    assert ocr.legible("", "hello") == ocr.legible("quite another text", "hi") == 0
    assert ocr.quoted('a sign that says "Stop now"') == "Stop now"
    assert ocr.quoted("a sign that says 'Stop', today's") == "Stop"
    for nothing in ("a sign", 'a sign "  "'):
        with pytest.raises(ValueError, match=f"{nothing!r} quotes no text to be read"):
            ocr.quoted(nothing)


def flow_grpo(read: str, prompt: str) -> float:
    """As Flow-GRPO's flow_grpo/ocr.py scores what was read."""
    wanted = prompt.split('"')[1].replace(" ", "").lower()
    read = read.replace(" ", "").lower()
    away = 0 if wanted in read else ocr.edit_distance(read, wanted)
    return 1 - min(away, len(wanted)) / len(wanted)


def test_legible_text_is_scored_as_flow_grpo_does():
    assert ocr.legible("HELO WORLD", "Hello World") == pytest.approx(0.9)
    file = Path(evaluation.__file__).parent / "prompts" / "flow-grpo-ocr-test.txt"
    prompts = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    assert len(prompts) == 1018
    for i, prompt in enumerate(prompts):
        text = ocr.quoted(prompt)
        reads = (text, text[1:], text.swapcase()[:-2] + "xy", f"so {text} it is", "", prompt[: 5 + i % 20])
        for read in reads:
            assert ocr.legible(read, text) == pytest.approx(flow_grpo(read, prompt), abs=1e-12), (read, prompt)


def test_text_is_read_by_rapidocr(monkeypatch):
    """Its engine is given (H, W, 3) in BGR, and its lines are joined; where nothing is read there is no text."""
    given = []

    class Engine:
        def __call__(self, picture):
            given.append(picture)
            return types.SimpleNamespace(txts=("HEL", "lo") if len(given) == 1 else None)

    monkeypatch.setattr(ocr.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ocr, "import_module", lambda name: types.SimpleNamespace(RapidOCR=Engine))
    images = noise_images(2)
    assert load("ocr")(images, ['"hello"'] * 2).tolist() == [1, 0]
    np.testing.assert_array_equal(given[0], (255 * images[0]).round().byte().flip(0).permute(1, 2, 0).numpy())


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(ocr.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs an extra: pip install 'difftune\[ocr\]'"):
        load("ocr")


# ---------------------------------------------------------------------------------------------- oracle


def test_oracle_accepts_the_caption_and_rejects_each_edit():
    texts = [TRUE, *grammar.edits(grammar.parse(TRUE), SCENE), *grammar.swaps(grammar.parse(TRUE), SCENE)]
    assert len(texts) > 20
    scores = Oracle()(picture(SCENE).expand(len(texts), -1, -1, -1), texts)
    assert scores.tolist() == [1.0] + [0.0] * (len(texts) - 1)


@pytest.mark.parametrize("size", [48, 128, 512])
def test_oracle_reads_pictures_of_other_sizes(size):
    rng = np.random.default_rng(0)
    pairs = [draw.draw(rng) for _ in range(12)]
    images = torch.stack([picture(scene, size) for _, scene in pairs])
    edits = [grammar.edits(*pair)[0] for pair in pairs]
    assert Oracle()(images, [str(caption) for caption, _ in pairs]).sum() >= 11
    assert Oracle()(images, edits).sum() == 0


def test_oracle_explains():
    images = picture(SCENE).expand(2, -1, -1, -1)
    held, why = Oracle().explain(images, [TRUE, "a green circle"])
    assert held == ""
    assert why.startswith("2 objects, not 1: ")


def test_oracle_refuses_what_it_cannot_judge():
    images = picture(SCENE)[None]
    with pytest.raises(ValueError, match="cannot parse 'a photo of a dog': 'dog' is none of"):
        Oracle()(images, ["a photo of a dog"])
    with pytest.raises(ValueError, match="square pictures, not 64 x 32 pixels"):
        Oracle()(images[..., :32], [TRUE])


# ---------------------------------------------------------------------------------------------- clip


def by_open_clip(folder, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """open_clip's own way: its preprocessing of a PIL picture, its tokenizer, the diagonal of its similarities."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
    batch = torch.stack([preprocess(Image.open(png(p))) for p in pixels])
    with torch.no_grad():
        pictures = model.eval().encode_image(batch)
        words = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(prompts))
    return torch.cosine_similarity(pictures, words)


def png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file


@pytest.mark.parametrize(("shape", "tolerance"), [((16, 16), 1e-5), ((64, 64), 0.01), ((24, 40), 0.01)])
def test_clip_score_is_open_clips_cosine(random_clip, shape, tolerance):
    """To rounding at the model's own size; elsewhere Pillow resizes in 8 bits and clips."""
    stripes = (torch.arange(shape[1]) % 3 == 0).expand(*shape)  # what a resize without antialiasing gets wrong
    smooth = torch.nn.functional.interpolate(noise_images(3, 4), shape, mode="bilinear")
    images = (255 * (0.5 * smooth + 0.3 * stripes)).round() / 255
    scores = clip.CLIPScore(random_clip)(images, PROMPTS)
    torch.testing.assert_close(scores, by_open_clip(random_clip, images, PROMPTS), rtol=0, atol=tolerance)
    assert scores.unique().numel() == 3


def test_clip_weights_are_frozen_and_float32(random_clip):
    model = clip.CLIPScore(random_clip).model
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_clip_reads_the_prompt_and_not_the_spaces_around_it(random_clip):
    reward = clip.CLIPScore(random_clip)
    images = noise_images(1).expand(2, -1, -1, -1)
    one, other = reward(images, ["a red circle", "a blue square"])
    assert abs(one - other) > 1e-3
    torch.testing.assert_close(reward(images[:1], ["  a red circle "])[0], one)


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no open_clip model in .*: it has no open_clip_config.json"):
        load("tiny-clip", folder=tmp_path)


def test_unknown_preprocessing_is_refused(random_clip, tmp_path):
    for file in random_clip.iterdir():
        text = file.read_bytes()
        if file.name == "open_clip_config.json":
            text = text.replace(b'"preprocess_cfg": {', b'"preprocess_cfg": {"resize_mode": "longest", ')
        (tmp_path / file.name).write_bytes(text)
    with pytest.raises(ValueError, match="resize_mode 'longest' is not supported, only shortest, squash"):
        clip.CLIPScore(tmp_path)


@pytest.mark.gpu
def test_clip_follows_the_images_to_their_device(random_clip):
    reward = clip.CLIPScore(random_clip)
    here = reward(noise_images(), PROMPTS)
    there = reward(noise_images().cuda(), PROMPTS)
    assert there.is_cuda
    torch.testing.assert_close(here, there.cpu(), rtol=1e-3, atol=1e-3)


def test_shipped_clip_prefers_the_true_caption_and_reaches_the_pixels():
    reward = load("tiny-clip")
    images = picture(SCENE)[None].requires_grad_()
    score = reward(images, [TRUE])
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.norm() > 0
    with torch.no_grad():
        others = reward(images.expand(2, -1, -1, -1), ["three green triangles", "a small square"])
    assert (score > others).all()


@pytest.mark.parametrize("count", [1, 3])
def test_contrast_is_the_standard_deviation_of_luma(count):
    """Of pictures that are not square, one alone and several."""
    images = torch.rand(count, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    luma = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    expected = luma.flatten(1).std(1, correction=0)
    torch.testing.assert_close(load("contrast")(images, ["x"] * count), expected)
    halves = torch.zeros(count, 3, 4, 4)
    halves[..., :2] = 1
    assert load("contrast")(halves, ["x"] * count).tolist() == pytest.approx([0.5] * count)
