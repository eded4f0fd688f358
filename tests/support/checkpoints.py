"""Small random checkpoints in the layouts that reward models are published in."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support import pipelines

CLIP_SIZES: dict[str, Any] = {
    "projection_dim": 8,
    "text_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
                    "hidden_act": "gelu", "max_position_embeddings": 16},
    "vision_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
}  # fmt: skip
BLIP_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square"]
BLIP_TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "encoder_hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 140, "layer_norm_eps": 1e-12,
    "is_decoder": True,
}  # fmt: skip


def lively(module: nn.Module) -> nn.Module:
    """Weights large enough that scores differ between pictures and prompts, biases and norms that are not trivial."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "logit_scale" in name:
                continue
            spread = 0.1 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5
            base = 1.0 if parameter.ndim == 1 and "norm" in name.replace("ln_", "norm") and "weight" in name else 0.0
            parameter.copy_(base + spread * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def open_clip_model() -> open_clip.CLIP:
    """A small open_clip CLIP of the built-in towers, of the sizes of `CLIP_SIZES`."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    torch.manual_seed(0)
    return lively(open_clip.CLIP(8, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)))


CLIP_LOOKS = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}


def open_clip_folder(folder: Path) -> Path:
    """A tiny random open_clip model in a folder of open_clip's own format, with a vocabulary of its own."""
    tokenizer = pipelines.tokenizer()
    tokenizer.save_pretrained(folder)
    tower = {"width": 16, "layers": 1}
    text = {"context_length": 8, "vocab_size": len(tokenizer), "heads": 2, "pool_type": "eos"}
    text |= {"hf_tokenizer_name": ".", "eos_id": tokenizer.eos_token_id}
    vision = {"image_size": 16, "patch_size": 8, "head_width": 8}
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": tower | vision, "text_cfg": tower | text},
        "preprocess_cfg": CLIP_LOOKS,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.half() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def hps_file(folder: Path) -> Path:
    """As HPS is published: an open_clip state under "state_dict", in a pickle."""
    torch.save({"epoch": 1, "state_dict": open_clip_model().state_dict()}, folder / "hps.pt")
    return folder / "hps.pt"


def clip_file(folder: Path, sizes: Mapping[str, Any] = CLIP_SIZES) -> Path:
    """As PickScore and OpenAI's CLIP are published: transformers' names, with the positions in it."""
    from transformers import CLIPConfig, CLIPModel

    model = lively(CLIPModel(CLIPConfig(**sizes)))
    state = dict(model.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


def aesthetic_model(width: int = 8) -> nn.Sequential:
    """The published stack: linear layers with dropout between them, the last two without."""
    linear = [nn.Linear(a, b) for a, b in zip([width, 24, 12, 6, 4], [24, 12, 6, 4, 1], strict=True)]
    a, b, c, d, e = linear
    return lively(nn.Sequential(a, nn.Dropout(0.2), b, nn.Dropout(0.2), c, nn.Dropout(0.1), d, e))


def aesthetic_file(folder: Path) -> Path:
    state = {f"layers.{key}": value for key, value in aesthetic_model().state_dict().items()}
    torch.save(state, folder / "aesthetic.pth")
    return folder / "aesthetic.pth"


def aesthetic_relu_model(width: int = 8) -> nn.Sequential:
    """The published network that has a ReLU and dropout after each layer, except the last two."""
    sizes, modules = [width, 24, 12, 6, 4], []
    for a, b in pairwise(sizes):
        modules += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.2)]
    return lively(nn.Sequential(*modules[:-1], nn.Linear(4, 1)))


def image_reward(folder: Path, numbers: Sequence[int] = (0, 2, 4, 6, 7)) -> tuple[Path, Path]:
    """(weights, vocabulary), in the layout of ImageReward.pt: BLIP's own names and the head, whose layers have these
    numbers."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    eyes = lively(BlipVisionModel(BlipVisionConfig(**BLIP_VISION)))
    words = lively(BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False))
    sizes = [16, 12, 8, 6, 4, 1]
    state = {f"blip.visual_encoder.{timm_name(key)}": value for key, value in eyes.state_dict().items()}
    state |= {f"blip.text_encoder.{key}": value for key, value in words.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state |= {"blip.vision_proj.weight": torch.ones(4, 32), "blip.text_proj.weight": torch.ones(4, 16)}
    for n, a, b in zip(numbers, sizes, sizes[1:], strict=False):
        layer = lively(nn.Linear(a, b))
        state |= {f"mlp.layers.{n}.weight": layer.weight.detach(), f"mlp.layers.{n}.bias": layer.bias.detach()}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder / "ImageReward.pt", folder / "vocab.txt"


def timm_name(key: str) -> str:
    """transformers' name of a BLIP vision weight in the layout of BLIP's own ViT."""
    for ours, theirs in (
        ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers.", "blocks."),
        ("self_attn.qkv", "attn.qkv"), ("self_attn.projection", "attn.proj"), ("layer_norm", "norm"),
        ("post_layernorm", "norm"),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    return key


CLASSES = ["cat, house cat", "dog", "mouse"]


def timm_classifier(folder: Path) -> Path:
    """A small ViT in the format that timm pushes to the Hub."""
    import timm

    arguments = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    model = lively(timm.create_model("test_vit", num_classes=3, **arguments))
    save_file(model.state_dict(), folder / "model.safetensors")
    about = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9}
    config = {"architecture": "test_vit", "num_classes": 3, "model_args": arguments, "label_names": CLASSES}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": about | {"interpolation": "bicubic"}}))
    return folder


VLM_WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "yes", "no", "a", "red", "blue", "circle", "square", "picture", "image", "better",
    "Yes", "two", "Two", "2",
]  # fmt: skip
TEXT_MODEL: dict[str, Any] = {
    "vocab_size": len(VLM_WORDS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def words_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VLM_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=VLM_WORDS[4:9],
    )  # fmt: skip


def template(image: str) -> str:
    part = "{% if c.type == 'image' %}" + image + "{% else %}{{ c.text }}{% endif %}"
    return "{% for m in messages %}{% for c in m.content %}" + part + "{% endfor %}{% endfor %}"


def llava(folder: Path) -> Path:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Llava

    eyes = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                            image_size=16, patch_size=8, projection_dim=32)  # fmt: skip
    config = LlavaConfig(vision_config=eyes, text_config=LlamaConfig(**TEXT_MODEL), image_token_index=4,
                         vision_feature_layer=-1)  # fmt: skip
    lively(Llava(config)).save_pretrained(folder)
    looks = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        looks, words_tokenizer(), patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        chat_template=template("<image>"), num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen(folder: Path) -> Path:
    """A Qwen2-VL: pictures of any shape, in patches."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers import Qwen2VLForConditionalGeneration as Qwen

    eyes = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    words = TEXT_MODEL | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    config = Qwen2VLConfig(text_config=words, vision_config=eyes, image_token_id=5, video_token_id=6,
                           vision_start_token_id=7, vision_end_token_id=8)  # fmt: skip
    lively(Qwen(config)).save_pretrained(folder)
    looks = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**looks), words_tokenizer(), Qwen2VLVideoProcessor(**looks),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def hpsv3(folder: Path) -> tuple[Path, Path]:
    """(weights, base): HPSv3's file in its published names, before transformers 4.52, and the base model's folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    words = [*special, "<|video_pad|>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    base = folder / "base"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>", additional_special_tokens=special[1:]
    ).save_pretrained(base)
    text = {
        "vocab_size": len(words) + 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }  # fmt: skip
    eyes = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text, vision_config=eyes, image_token_id=5, video_token_id=6, vision_start_token_id=3,
        vision_end_token_id=4,
    )  # fmt: skip
    config.save_pretrained(base)
    config.text_config.vocab_size = len(words) + 1  # as HPSv3's own: with its token, and fewer than the base's
    model = lively(Qwen2VLModel(config))
    state = {key.replace("language_model.", "model."): value for key, value in model.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(len(words) + 1, 32)
    for n, a, b in ((0, 32, 12), (3, 12, 6), (5, 6, 2)):
        layer = lively(nn.Linear(a, b))
        state |= {f"rm_head.{n}.weight": layer.weight.detach(), f"rm_head.{n}.bias": layer.bias.detach()}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "HPSv3.safetensors")
    return folder / "HPSv3.safetensors", base


def alexnet_model() -> nn.Module:
    """torchvision's AlexNet with small random weights: its convolutions, and of its classifier one layer."""
    from torchvision.models import alexnet

    with torch.device("meta"):
        model = alexnet()
    model.classifier = nn.Sequential(nn.Linear(4, 2))
    return lively(model.to_empty(device="cpu"))


def alexnet_file(folder: Path) -> Path:
    """As torchvision publishes it: a pickle with features.N and classifier.N."""
    torch.save(alexnet_model().state_dict(), folder / "alexnet.pth")
    return folder / "alexnet.pth"


def clip_t5(folder: Path) -> dict[str, Path]:
    """CLIP-FlanT5 in small: the T5 with its projector, the CLIP and the tokenizer, each in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, T5Config
    from transformers import T5ForConditionalGeneration as T5

    found = {name: folder / name for name in ("model", "vision", "words")}
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, tie_word_embeddings=False,
                      feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    model, projector = T5(config), nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 16))
    for parameter in lively(model).parameters():  # T5's attention does not divide by the root of the width
        parameter.data.mul_(1.0 if parameter.ndim < 2 else 0.4)
    state = {**model.state_dict()}
    state |= {f"mm_projector.{key}": value for key, value in lively(projector).state_dict().items()}
    config.save_pretrained(found["model"])
    save_file({key: value.clone().contiguous() for key, value in state.items()}, found["model"] / "model.safetensors")
    eyes = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                            image_size=32, patch_size=8, projection_dim=32)  # fmt: skip
    lively(CLIPVisionModel(eyes)).save_pretrained(found["vision"])
    words = ["<pad>", "</s>", "<unk>", "Yes", "a", "red", "blue", "circle", "square", "figure", "show", "?", "USER"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(found["words"])
    return found
