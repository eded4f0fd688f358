"""Learned rewards against the implementations that their layouts come from, on small random checkpoints."""

import json
import types
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import (
    AutoProcessor,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
)

from rewards import hub
from rewards.learned import aesthetic, clip, soft_tifa
from rewards.learned.aesthetic import Aesthetic
from rewards.learned.classify import TinyClassifier, classifier, timm_preprocess
from rewards.learned.imagereward import MEAN, STD, ImageReward
from rewards.learned.layouts import built, clip_from_open_clip
from rewards.learned.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, transformers_preprocess
from rewards.learned.soft_tifa import SoftTIFA
from rewards.learned.vlm import VLMJudge
from rewards.registry import load
from tests.support import checkpoints

PROMPTS = ["a red circle", "a blue square", "a red square"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SAME = {"rtol": 0, "atol": 1e-6}


# ---------------------------------------------------------------------------------------------- clip and hps


@pytest.fixture(scope="module")
def hps(made):
    return clip.hps(**made["hps-v2.1"])


@torch.no_grad()
def test_mapping_of_clip_is_open_clips_model(hps):
    model = checkpoints.open_clip_model()
    ids = open_clip.SimpleTokenizer(context_length=16)(PROMPTS)
    x = Preprocess(32)(IMAGES)
    torch.testing.assert_close(hps.image_features(IMAGES), model.encode_image(x, normalize=True), **SAME)
    torch.testing.assert_close(hps.text_features(PROMPTS), model.encode_text(ids, normalize=True), **SAME)


@torch.no_grad()
def test_hps_is_the_plain_cosine_of_padded_pictures(hps):
    """As its authors compute it: the diagonal of image @ text.T, without the logit scale."""
    wide = IMAGES[:, :, :16]
    seen = (F.pad(wide, (0, 0, 8, 8)) - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    model = checkpoints.open_clip_model()
    ids = open_clip.SimpleTokenizer(context_length=16)(PROMPTS)
    logits = model.encode_image(seen, normalize=True) @ model.encode_text(ids, normalize=True).T
    torch.testing.assert_close(hps(wide, PROMPTS), logits.diagonal(), **SAME)


def test_hps_has_two_versions(made):
    assert torch.equal(
        load("hps-v2", **made["hps-v2"])(IMAGES, PROMPTS), clip.hps("2", **made["hps-v2"])(IMAGES, PROMPTS)
    )
    with pytest.raises(ValueError, match="HPS has the versions 2 and 2.1, not '3'"):
        clip.hps("3", **made["hps-v2"])


@torch.no_grad()
def test_pickscore_is_the_scaled_cosine_of_transformers_clip(made, tmp_path):
    model = built(
        CLIPModel, clip.CLIPConfig(**checkpoints.CLIP_SIZES), clip._state(made["pickscore"]["weights"], "") | {}
    )
    found = model(pixel_values=Preprocess(32)(IMAGES), input_ids=clip._tokenizer(16)(PROMPTS))
    expected = found.logits_per_image.diagonal()
    torch.testing.assert_close(load("pickscore", **made["pickscore"])(IMAGES, PROMPTS), expected, rtol=1e-6, atol=1e-5)
    cosine = load("clip-score", **made["clip-score"])(IMAGES, PROMPTS)
    torch.testing.assert_close(cosine, expected / model.logit_scale.exp(), rtol=0, atol=1e-6)


def test_clip_of_a_folder_is_that_of_its_weights(made, tmp_path):
    """A CLIPModel as `save_pretrained` writes it, with a tokenizer of its own."""
    model = clip.clip_score(**made["clip-score"]).model
    model.save_pretrained(tmp_path)
    checkpoints.words_tokenizer().save_pretrained(tmp_path)
    reward = clip.clip_score(tmp_path)
    torch.testing.assert_close(
        reward.image_features(IMAGES), clip.clip_score(**made["clip-score"]).image_features(IMAGES), **SAME
    )
    assert reward.tokenize(PROMPTS).shape == (3, 16)
    assert reward(IMAGES, PROMPTS).unique().numel() == 3
    looks = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3)
    looks.save_pretrained(tmp_path)
    assert list(clip.clip_score(tmp_path).preprocess.mean) == [0.5] * 3


@pytest.mark.parametrize("name", ["clip-score", "aesthetic", "imagereward", "classifier", "tiny-clip", "vlm"])
def test_dtype_that_is_not_known_is_named(name, options):
    sentence = r"no dtype of a network 'bfloat' \(did you mean 'bfloat16'\?\); known: bfloat16, float16, float32"
    arguments = options[name] if name != "tiny-clip" else {}
    with pytest.raises(ValueError, match=sentence):
        if name == "tiny-clip":
            clip.CLIPScore(clip.TINY, "bfloat")
        load(name, **arguments, dtype="bfloat")


@pytest.mark.parametrize("what", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(what):
    state = clip_from_open_clip(checkpoints.open_clip_model().state_dict())
    if what == "missing":
        del state["visual_projection.weight"]
    elif what == "unexpected":
        state["more.weight"] = torch.ones(2)
    else:
        state["visual_projection.weight"] = torch.ones(3, 3)
    with pytest.raises((ValueError, RuntimeError), match=rf"{what}|visual_projection|size mismatch"):
        built(CLIPModel, clip.CLIPConfig(**checkpoints.CLIP_SIZES), state)


def test_open_clip_model_that_is_not_there_lists_its_tags():
    with pytest.raises(
        ValueError, match="no model 'ViT-B-32' with tag 'xyz' on the Hub; its tags: .*laion2b_s34b_b79k"
    ):
        clip.open_clip_score("ViT-B-32", "xyz")


@torch.no_grad()
def test_clips_logit_is_the_cosine_times_the_models_scale(monkeypatch):
    monkeypatch.setattr(clip, "open_clip_score", lambda model, pretrained, dtype: clip.CLIPScore(clip.TINY, dtype))
    prompts = ["a red circle", "a blue square"]
    images = IMAGES[:2]
    reward = load("clip")
    expected = reward.model.logit_scale.exp() * clip.tiny_clip()(images, prompts)
    torch.testing.assert_close(reward(images, prompts), expected, **SAME)


# ---------------------------------------------------------------------------------------------- aesthetic


LAION = Path(__file__).parents[2] / "data" / "laion-v1"
RATED = np.concatenate([np.load(LAION / f"vit-l-14-rating{i}.npy") for i in range(10)])  # unit embeddings, (10, 768)


def probes(width: int) -> torch.Tensor:
    """Unit vectors (4, width) whose scores are known: an axis, the diagonal, a sine, and noise."""
    rows = np.zeros((4, width))
    rows[0, 0], rows[1], rows[2] = 1, 1, np.sin(np.arange(width) + 1)
    rows[3] = np.random.default_rng(0).standard_normal(width)
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


PUBLISHED = {  # of the published heads, in float64
    "sac": (4.545052400554, 4.883284854377, 5.483880132144, 4.464580885594),
    "ava": (4.449708890988, 5.468160991696, 5.071122663904, 5.388827633230),
    "v1": (5.402092218399, 1.513129669799, 2.482286699979, 3.996170018839),
}
OF_RATED = {
    "sac": (1.655480, 2.359275, 3.069824, 3.672451, 4.238010, 4.701021, 5.073054, 5.365362, 5.576664, 5.746761),
    "ava": (4.512627, 4.476255, 4.491877, 4.595875, 4.705411, 4.843347, 5.003933, 5.147889, 5.230896, 5.266402),
    "v1": (-2.457908, -0.137857, 1.895110, 3.584934, 5.099726, 6.470104, 7.786990, 9.048002, 10.226408, 11.304426),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_bundled_heads_score_as_the_published_ones(variant):
    head = aesthetic.head_of(aesthetic.bundled(variant))
    for features, scores, tolerance in (
        (probes(768), PUBLISHED[variant], 1e-11),
        (torch.from_numpy(RATED).double(), OF_RATED[variant], 1e-6),
    ):
        expected, double = torch.tensor(scores, dtype=torch.float64), aesthetic.score(head, features)
        torch.testing.assert_close(double, expected, rtol=0, atol=tolerance)
        single = aesthetic.score(head, features.float())
        torch.testing.assert_close(single, double.float(), rtol=1e-7, atol=1e-6)  # two of float32's steps at 11


def test_published_files_of_the_first_predictor_are_read():
    """With the scores of the smaller one, of ViT-B/32, and the bundled map from the larger."""
    small = aesthetic.head_of(hub.read(LAION / "sa_0_4_vit_b_32_linear.pth"))
    expected = [4.629550457001, 3.908163292287, 3.535471292915, 1.958557276449]
    assert aesthetic.score(small, probes(512)).tolist() == pytest.approx(expected, abs=1e-11)
    large, kept = hub.read(LAION / "sa_0_4_vit_l_14_linear.pth"), aesthetic.bundled("v1")
    assert all(torch.equal(large[name].double(), kept[name]) for name in ("weight", "bias"))


def layers_of(model: nn.Sequential, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{key}": value for key, value in model.state_dict().items()}


def test_linear_layers_are_one_map_and_a_network_stays_one():
    x = torch.randn(64, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    linear, relu = checkpoints.aesthetic_model(768).double(), checkpoints.aesthetic_relu_model(768).double()
    for model, maps in ((linear, 1), (relu, 5)):
        head = aesthetic.head_of(layers_of(model.eval(), "layers"))
        assert len(head) == maps
        torch.testing.assert_close(aesthetic.score(head, x), model(x).squeeze(1), **SAME)
    later = {key.replace("layers.7", "layers.8"): value for key, value in layers_of(linear, "layers").items()}
    renamed = {key.replace("layers", "scoring_head"): value for key, value in later.items()}  # as v2.5 has them
    torch.testing.assert_close(aesthetic.score(aesthetic.head_of(renamed), x), linear(x).squeeze(1), **SAME)


@pytest.mark.parametrize("wrong", ["layers.0.weight", "layers.7.bias", "added"])
def test_a_head_of_another_layout_is_refused(wrong):
    layers = layers_of(checkpoints.aesthetic_model(), "layers")
    layers = layers | {"layers.9.weight": torch.ones(1)} if wrong == "added" else layers
    layers.pop(wrong, None)
    with pytest.raises(ValueError, match="is not a known aesthetic predictor: give a file of layers"):
        aesthetic.head_of(layers)


def test_a_head_of_another_width_is_refused(made, tmp_path):
    """That of another CLIP, and one whose layers do not follow each other, in a sentence at load."""
    layers = layers_of(checkpoints.aesthetic_model(12), "layers")
    torch.save(layers, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="reads an embedding of 12 numbers, and this CLIP gives 8: give"):
        Aesthetic(**made["aesthetic"] | {"predictor": tmp_path / "wide.pth"})
    with pytest.raises(ValueError, match="give .* numbers and the next read"):
        aesthetic.head_of(layers | {"layers.2.weight": torch.ones(12, 7)})


@torch.no_grad()
def test_aesthetic_is_the_network_on_the_normalised_embedding(made):
    reward = Aesthetic(**made["aesthetic"])
    features = load("clip-score", **made["clip-score"]).image_features(IMAGES)
    expected = checkpoints.aesthetic_model()(features).squeeze(1)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the variants sac, ava and v1, not 'v3'"):
        Aesthetic("v3")


# ---------------------------------------------------------------------------------------------- imagereward


def first_states() -> torch.Tensor:
    """What the head sees, by the parts built by themselves with the weights that the checkpoints were made of."""
    eyes = checkpoints.lively(BlipVisionModel(BlipVisionConfig(**checkpoints.BLIP_VISION)))
    words = checkpoints.lively(BlipTextModel(BlipTextConfig(**checkpoints.BLIP_TEXT), add_pooling_layer=False))
    seen = eyes(pixel_values=Preprocess(32)(IMAGES)).last_hidden_state
    ids = torch.tensor([[2, 5, 6, 8, 3], [2, 5, 7, 9, 3], [2, 5, 6, 9, 3]])  # [CLS] a red circle [SEP]
    return words(input_ids=ids, encoder_hidden_states=seen, attention_mask=torch.ones(3, 5)).last_hidden_state[:, 0]


@torch.no_grad()
def test_imagereward_is_transformers_blip_under_its_head(made):
    x, state = first_states(), torch.load(made["imagereward"]["weights"], weights_only=True)
    for n in (0, 2, 4, 6, 7):
        x = F.linear(x, state[f"mlp.layers.{n}.weight"], state[f"mlp.layers.{n}.bias"])
    scores = ImageReward(**made["imagereward"])(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, (x.squeeze(1) - MEAN) / STD, **SAME)
    assert abs(MEAN - 0.16717363) < 1e-8 and abs(STD - 1.03333950) < 1e-8


@torch.no_grad()
def test_cyclereward_has_a_gelu_between_its_layers_and_no_mean(made):
    x, state = first_states(), torch.load(made["cyclereward"]["weights"], weights_only=True)
    for n in (0, 2, 4, 6, 8):
        x = F.linear(F.gelu(x) if n else x, state[f"mlp.layers.{n}.weight"], state[f"mlp.layers.{n}.bias"])
    reward = load("cyclereward", **made["cyclereward"])
    torch.testing.assert_close(reward(IMAGES, PROMPTS), x.squeeze(1), **SAME)
    long = [" ".join(["red"] * count) for count in (100, 126, 127)]
    scores = reward(IMAGES[:1].expand(3, -1, -1, -1), long)
    assert scores[0] != scores[1] and scores[1] == scores[2]  # 128 tokens, of which two are marks
    with pytest.raises(ValueError, match="the pairs Combo, T2I and I2T, not 'T2V'"):
        load("cyclereward", pairs="T2V")


def test_imagereward_reads_the_prompt_and_cuts_what_is_longer(made):
    reward = ImageReward(**made["imagereward"])
    same = IMAGES[:1].expand(3, -1, -1, -1)
    assert reward(same, PROMPTS).unique().numel() == 3
    long = " ".join(["red"] * 60)
    scores = reward(same, [long, long + " blue square", "red"])
    torch.testing.assert_close(scores[0], scores[1])


# ---------------------------------------------------------------------------------------------- preprocessing


def smooth(height: int, width: int) -> torch.Tensor:
    """A picture of large and small structure, as 8 bits hold it."""
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), (height, width), mode="bicubic")
    x = coarse + 0.1 * torch.rand(1, 3, height, width, generator=generator)
    return (255 * x.clamp(0, 1)).round()[0] / 255


def pil(x: torch.Tensor) -> Image.Image:
    return Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy())


def hps_transform(image: Image.Image) -> torch.Tensor:
    """Longest side to 224 by Pillow, in the middle of black, then normalised."""
    scale = 224 / max(image.size)
    small = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (224, 224))
    canvas.paste(small, tuple((224 - side) // 2 for side in small.size))
    return v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])(
        canvas
    )


def clip_transform(image: Image.Image) -> torch.Tensor:
    return open_clip.image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)(image)


PATHS = {  # ours, and the PIL path that the models were trained with
    "clip, pickscore, imagereward, aesthetic": (Preprocess(), clip_transform),
    "hps": (Preprocess(fit="pad"), hps_transform),
    "timm": (
        Preprocess(160, "crop", (0.5,) * 3, (0.5,) * 3, "bicubic", 168),
        create_transform((3, 160, 160), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.95),
    ),
}
MEAN_ERROR, MAX_ERROR = 0.002, 0.01  # in pixel values of [0, 1]: rounding to 8 bits is 0.001 on average, 0.002 at most


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("size", [(512, 512), (300, 450), (512, 333)])  # 333 becomes 145.7: a side is rounded
def test_preprocessing_is_the_pil_path(name, size):
    ours, theirs = PATHS[name]
    x = smooth(*size)
    std = torch.tensor(list(ours.std)).view(3, 1, 1)
    error = (ours(x[None])[0] - theirs(pil(x))).abs() * std
    assert error.mean() < MEAN_ERROR and error.max() < MAX_ERROR


def test_preprocessing_of_transformers_configurations():
    """A squash, a shorter side with a crop, and ConvNeXt's crop_pct."""
    x = smooth(96, 144)
    facts = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    looks = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32})
    ours = transformers_preprocess(json.loads(looks.to_json_string()))
    theirs = looks(images=pil(x), return_tensors="pt").pixel_values
    assert (ours(x[None]) - theirs).abs().mean() < 0.02
    squash = transformers_preprocess(facts | {"size": {"height": 32, "width": 32}, "resample": 2})
    assert squash == Preprocess(32, "squash", CLIP_MEAN, CLIP_STD, "bilinear")
    convnext = transformers_preprocess(facts | {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3})
    assert convnext == Preprocess(224, "crop", CLIP_MEAN, CLIP_STD, "bicubic", 256)
    large = facts | {"size": {"shortest_edge": 232}, "crop_size": {"height": 160, "width": 160}, "do_center_crop": True}
    assert transformers_preprocess(large) == Preprocess(160, "crop", CLIP_MEAN, CLIP_STD, "bilinear", 232)


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        ({"size": {"longest_edge": 32}}, "an image processor with size .* is not supported"),
        ({"resample": 0}, "with resample 0 is not supported"),
        ({"do_normalize": False}, "with do_normalize False is not supported"),
        ({"include_top": True}, "with include_top True is not supported"),  # EfficientNet's, which normalises twice
    ],
)
def test_preprocessing_that_is_not_known_is_refused(about, sentence):
    facts = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"height": 32, "width": 32}}
    with pytest.raises(ValueError, match=sentence):
        transformers_preprocess(facts | about)


def test_timm_preprocessing_that_is_not_known_is_refused():
    facts = {"input_size": [3, 32, 32], "mean": CLIP_MEAN, "std": CLIP_STD}
    with pytest.raises(ValueError, match="with interpolation 'nearest' is not supported, only bilinear, bicubic"):
        timm_preprocess(facts | {"interpolation": "nearest"})
    with pytest.raises(ValueError, match="input 32 x 32 and crop mode 'border' is not supported"):
        timm_preprocess(facts | {"crop_mode": "border"})


# ---------------------------------------------------------------------------------------------- classifiers


@torch.no_grad()
def test_timm_classifier_is_timms_model(made):
    folder = made["classifier"]["model"]
    reward = classifier(folder)
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model("test_vit", num_classes=3, **config["model_args"])
    model.load_state_dict(timm.models.load_state_dict(str(folder / "model.safetensors")))
    data = resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    picture = smooth(64, 80)
    expected = model.eval()(create_transform(**data)(pil(picture))[None]).log_softmax(1)
    torch.testing.assert_close(reward.log_probabilities(picture[None]), expected, rtol=0, atol=0.02)
    scores = reward(IMAGES, ["house cat", "DOG", "2"])
    assert torch.equal(scores, reward.log_probabilities(IMAGES)[range(3), range(3)])
    torch.testing.assert_close(reward.log_probabilities(IMAGES).exp().sum(1), torch.ones(3))


@torch.no_grad()
def test_transformers_classifier_is_the_models_log_probability(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog"})
    model = checkpoints.lively(ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    looks = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    looks.save_pretrained(tmp_path)
    expected = model(pixel_values=2 * IMAGES - 1).logits.log_softmax(1)
    torch.testing.assert_close(classifier(tmp_path, "dog")(IMAGES, [""] * 3), expected[:, 1], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"no class 'dig' \(did you mean 'dog'\?\); known: cat, dog"):
        classifier(tmp_path, "dig")
    with pytest.raises(ValueError, match="no class '7'"):
        classifier(tmp_path)(IMAGES, ["7"] * 3)


def test_tiny_classifier_sums_over_what_the_caption_leaves_open():
    reward = TinyClassifier()
    images = F.interpolate(IMAGES, (64, 64))
    colors = ["red", "green", "blue", "yellow", "purple", "orange"]
    each = torch.stack([reward(images, [f"a {color} circle"] * 3) for color in colors])
    torch.testing.assert_close(reward(images, ["a circle"] * 3), each.logsumexp(0))
    everything = [reward(images, [f"a {shape}"] * 3) for shape in ("circle", "square", "triangle")]
    torch.testing.assert_close(torch.stack(everything).logsumexp(0), torch.zeros(3), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="pictures of one object, not 'a circle and a square'"):
        reward(images, ["a circle and a square"] * 3)


# ---------------------------------------------------------------------------------------------- judges


@pytest.fixture(scope="module", params=["llava", "qwen"])
def judge(request, tmp_path_factory):
    return getattr(checkpoints, request.param)(tmp_path_factory.mktemp(request.param))


def answers(model, image: torch.Tensor, question: str) -> dict[str, float]:
    """The probability of each word as the answer, by the model's own processor on a PIL picture."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = model.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = model.processor(text=[text], images=[[pil(image)]], return_tensors="pt")
    chances = model.network(**inputs).logits[0, -1].softmax(0)
    return dict(zip(checkpoints.VLM_WORDS, chances.tolist(), strict=True))


@torch.no_grad()
def test_judge_is_the_probability_of_yes(judge):
    """Against the model's own processor on PIL pictures, with yes, Yes and no in the vocabulary."""
    reward = VLMJudge(judge)
    images = (255 * F.interpolate(IMAGES, (24, 24))).round() / 255
    for image, prompt, score in zip(images, PROMPTS, reward(images, PROMPTS), strict=True):
        chances = answers(reward.model, image, reward.question.format(prompt=prompt))
        yes, no = chances["yes"] + chances["Yes"], chances["no"]
        assert abs(yes / (yes + no) - score) < 0.03


ROUND = (255 * F.interpolate(IMAGES, (24, 24))).round() / 255  # as a PIL picture holds them


@torch.no_grad()
def test_vqascore_is_the_probability_of_yes_among_all_tokens(judge):
    reward = load("vqascore", model=judge)
    for image, prompt, score in zip(ROUND, PROMPTS, reward(ROUND, PROMPTS), strict=True):
        chances = answers(reward.model, image, f'Does this figure show "{prompt}"? Please answer Yes or No.')
        assert abs(chances["Yes"] - score) < 0.005
    with pytest.raises(ValueError, match="does not say where the prompt stands: write {prompt}"):
        load("vqascore", model=judge, question="Is it good?")
    with pytest.raises(ValueError, match="over answers or vocabulary, not 'tokens'"):
        load("vlm", model=judge, normalise="tokens")


ASKED = {PROMPTS[0]: [("Is there a circle?", "Yes"), ("How many squares are there?", "two")]}


@torch.no_grad()
def test_soft_tifa_is_the_mean_probability_of_the_right_answers(judge):
    image, asked = ROUND[:1], [f"{question} Answer in one word." for question, _ in ASKED[PROMPTS[0]]]
    reward = load("soft-tifa", model=judge, questions=ASKED)
    first, second = (answers(reward.model, ROUND[0], question) for question in asked)
    yes, two = first["yes"] + first["Yes"], second["two"] + second["Two"] + second["2"]
    assert abs(reward(image, PROMPTS[:1]).item() - (yes + two) / 2) < 0.005
    geometric = load("soft-tifa", model=judge, questions=ASKED, mean="geometric")
    assert abs(geometric(image, PROMPTS[:1]).item() - (yes * two) ** 0.5) < 0.005
    twice = load("soft-tifa", model=judge, questions=ASKED, original=True)  # each word also after a space
    assert abs(twice(image, PROMPTS[:1]).item() - (yes + two)) < 0.01


@pytest.mark.parametrize(("mean", "expected"), [("arithmetic", 0.8), ("geometric", 0.7745966692)])
def test_means_of_soft_tifa_over_questions(mean, expected, made, monkeypatch):
    chances = {"a": 0.9, "b": 0.8, "c": 1.0, "d": 0.5}
    monkeypatch.setattr(SoftTIFA, "probability", lambda self, x, question, answer: torch.tensor(chances[question]))
    asked = {PROMPTS[0]: [(question, "yes") for question in chances]}
    reward = load("soft-tifa", **made["vlm"], questions=asked, mean=mean)
    assert reward(IMAGES[:1], PROMPTS[:1]).item() == pytest.approx(expected, abs=1e-7)


def test_forms_of_an_answer():
    assert soft_tifa.forms("Yes") == ("yes", "Yes", " yes", " Yes")
    assert soft_tifa.forms("three") == ("three", "Three", " three", " Three", "3", " 3")
    assert soft_tifa.forms("red") == ("red", "Red", " red", " Red")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not json", "line 1 of .* is not"),
        ('{"prompt": "a", "vqa_list": []}', "line 1 of .* is not"),
        ('\n{"prompt": "a", "vqa_list": [["only a question"]]}', "line 2 of .* is not"),
        ('{"prompt": 3, "vqa_list": [["q", "yes"]]}', "line 1 of .* is not"),
        (
            '{"prompt": "another", "vqa_list": [["q", "yes"]]}',
            "no questions about the prompt 'a red circle': add a line",
        ),
    ],
)
def test_questions_of_another_form_and_prompts_without_any_are_refused(text, sentence, made, tmp_path):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load("soft-tifa", **made["vlm"], questions=tmp_path / "q.jsonl")(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match="there is no file of questions at"):
        load("soft-tifa", **made["vlm"], questions=tmp_path / "none.jsonl")


def test_judge_of_two_pictures_has_no_favourite_order(judge):
    """r(a, b) + r(b, a) = 1, and a picture is exactly as good as itself."""
    a, b = IMAGES[:1, :, :24, :24], IMAGES[1:2, :, :24, :24]
    one, other = VLMJudge(judge, reference=b[0]), VLMJudge(judge, reference={PROMPTS[0]: a[0]})
    total = one(a, PROMPTS[:1]) + other(b, PROMPTS[:1])
    torch.testing.assert_close(total, torch.ones(1))
    torch.testing.assert_close(one(b, PROMPTS[:1]), torch.tensor([0.5]))
    assert abs(one(a, PROMPTS[:1]) - 0.5) > 1e-3
    with pytest.raises(ValueError, match="no reference picture of the prompt 'another': give one for every prompt"):
        other(b, ["another"])


def test_gradient_of_a_judge_reaches_the_pixels(judge):
    images = IMAGES[:2].clone().requires_grad_()
    reward = VLMJudge(judge)
    assert reward.differentiable
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_processor_on_pillow_leaves_a_judge_without_a_gradient(tmp_path, monkeypatch):
    folder = checkpoints.llava(tmp_path)
    looks = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})

    def on_pillow(folder):
        processor = AutoProcessor.from_pretrained(folder)
        processor.image_processor = looks
        return processor

    expected = VLMJudge(folder)(IMAGES, PROMPTS)
    monkeypatch.setattr("rewards.learned.vlm.AutoProcessor", types.SimpleNamespace(from_pretrained=on_pillow))
    reward = VLMJudge(folder)
    assert not reward.differentiable
    scores = reward(IMAGES.clone().requires_grad_(), PROMPTS)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.02)


def test_judge_sees_grey_as_one_half(judge):
    reward = VLMJudge(judge)
    looks = reward.model.processor.image_processor
    seen = reward.model.inputs([torch.full((3, 16, 16), 0.5)], "")["pixel_values"].flatten(0, -2)
    half = torch.full((3,), 0.5)
    expected = (half - torch.tensor(looks.image_mean)) / torch.tensor(looks.image_std)
    torch.testing.assert_close(seen.unique().sort().values, expected.unique().sort().values, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- text exemplars


@torch.no_grad()
def test_text_exemplar_is_the_cosine_to_the_mean_text(random_clip):
    reward = load("text-exemplar", texts=PROMPTS, options={"folder": random_clip})
    towers = clip.CLIPScore(random_clip)
    mean = towers.text_features(PROMPTS).mean(0)
    expected = torch.cosine_similarity(towers.image_features(IMAGES), mean[None])
    torch.testing.assert_close(reward(IMAGES, [""] * 3), expected)
    one = load("text-exemplar", texts=PROMPTS[:1], options={"folder": random_clip})
    torch.testing.assert_close(one(IMAGES, [""] * 3), towers(IMAGES, PROMPTS[:1] * 3))
    with pytest.raises(ValueError, match="a list of one text or more, not 'red'"):
        load("text-exemplar", texts="red")
    with pytest.raises(ValueError, match="reward 'brightness' has no towers"):
        load("text-exemplar", texts=["red"], encoder="brightness")
