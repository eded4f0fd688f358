"""Tiny random pipelines of the families with a transformer, beside `tests.support.pipelines` of Stable Diffusion."""

from functools import cache
from types import FunctionType
from zlib import crc32

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.support.pipelines import LATENT, WIDTH, text_encoder, tokenizer, vae

LETTERS = [chr(i) for i in range(33, 127)]
TEXT = 2 * WIDTH  # width of T5 and Gemma
DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}  # what Sana ships


@cache
def t5_vocabulary():
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]


def t5():
    config = {"d_model": TEXT, "d_kv": 8, "d_ff": TEXT, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(t5_vocabulary()), **config)).eval()


def t5_tokenizer():
    return T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0, model_max_length=512)


@cache
def gemma_vocabulary():
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n"]
    return {token: i for i, token in enumerate([*special, *LETTERS, *(f"<0x{i:02X}>" for i in range(256))])}


def gemma():
    size = {"hidden_size": TEXT, "intermediate_size": TEXT, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(gemma_vocabulary())}
    return Gemma2Model(Gemma2Config(**size, **heads)).eval()


def gemma_tokenizer():
    return GemmaTokenizer(vocab=dict(gemma_vocabulary()), merges=[])


def clip():
    return text_encoder(CLIPTextModelWithProjection, projection_dim=WIDTH, hidden_act="gelu")


def flow(**config):
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def built(kind, seed=0, **parts):
    """kind(**parts), where a part that is a function is called now: seeded, and quiet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {name: part() if isinstance(part, FunctionType) else part for name, part in parts.items()}
        pipe = kind(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shaken(network, deviation=0.1):
    """The network with noise on every parameter: many of a fresh transformer's are zero."""
    for parameter in network.parameters():
        parameter.data.add_(deviation * torch.randn(parameter.shape))
    return network.eval()


HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


def sd3(scheduler=None, channels=4, **config):
    size = {"sample_size": LATENT, "in_channels": channels, "out_channels": channels, "num_layers": 2, **HEADS}
    texts = {"joint_attention_dim": TEXT, "caption_projection_dim": 16, "pooled_projection_dim": 2 * WIDTH}
    return built(
        diffusers.StableDiffusion3Pipeline,
        transformer=lambda: shaken(
            diffusers.SD3Transformer2DModel(**size, **texts, **{"pos_embed_max_size": 16, **config})
        ),
        scheduler=scheduler or flow(),
        vae=lambda: vae(shift_factor=0.1, scaling_factor=1.5, latent_channels=channels),
        text_encoder=clip,
        text_encoder_2=clip,
        text_encoder_3=t5,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(pad_token="!"),
        tokenizer_3=t5_tokenizer(),
    )


def flux(scheduler=None, guidance_embeds=False, **config):
    size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2}
    texts = {"joint_attention_dim": TEXT, "pooled_projection_dim": WIDTH, "guidance_embeds": guidance_embeds}
    return built(
        diffusers.FluxPipeline,
        transformer=lambda: shaken(diffusers.FluxTransformer2DModel(**{**size, **heads, **texts, **config})),
        scheduler=scheduler or flow(use_dynamic_shifting=guidance_embeds),
        vae=lambda: vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=text_encoder,
        text_encoder_2=t5,
        tokenizer=tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )


def chroma(scheduler=None, **config):
    size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 4, 8)}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TEXT}
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 1}
    return built(
        diffusers.ChromaPipeline,
        transformer=lambda: shaken(diffusers.ChromaTransformer2DModel(**{**size, **heads, **approximator, **config})),
        scheduler=scheduler or flow(),
        vae=lambda: vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=t5,
        tokenizer=t5_tokenizer(),
    )


def byte_letters():
    """The letters that stand for the bytes, as GPT-2's tokenizer writes them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def qwen3(layers, **config):
    size = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=300, num_hidden_layers=layers, **size, **config)).eval()


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def qwen_tokenizer():
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    words = {word: i for i, word in enumerate([*byte_letters(), *special])}
    made = Qwen2Tokenizer(vocab=words, merges=[], extra_special_tokens=special[:2])
    made.chat_template = CHAT
    return made


def flux2_autoencoder():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1, **blocks
    )
    made.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 16))
    made.bn.running_var.copy_(torch.linspace(0.5, 1.7, 16))
    return made.eval()


def flux2(scheduler=None, is_distilled=False, **config):
    """FLUX.2 klein; its text model has the 27 layers that are read."""
    size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "timestep_guidance_channels": 16}
    texts = {"joint_attention_dim": 24, "guidance_embeds": False}
    return built(
        diffusers.Flux2KleinPipeline,
        transformer=lambda: shaken(diffusers.Flux2Transformer2DModel(**{**size, **heads, **texts, **config})),
        scheduler=scheduler or flow(use_dynamic_shifting=True),
        vae=flux2_autoencoder,
        text_encoder=lambda: qwen3(27),
        tokenizer=qwen_tokenizer(),
        is_distilled=is_distilled,
    )


def flux2_dev(scheduler=None, **config):
    """FLUX.2 dev, whose texts are encoded by numbers of their own in place of Mistral, which is too large to build."""
    size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 4, 4)}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "timestep_guidance_channels": 16}
    texts = {"joint_attention_dim": 24, "guidance_embeds": True}
    made = built(
        diffusers.Flux2Pipeline,
        transformer=lambda: shaken(diffusers.Flux2Transformer2DModel(**{**size, **heads, **texts, **config})),
        scheduler=scheduler or flow(use_dynamic_shifting=True),
        vae=flux2_autoencoder,
        text_encoder=None,
        tokenizer=None,
    )

    def encode_prompt(prompt, prompt_embeds=None, **options):
        if prompt_embeds is None:
            draws = [torch.Generator().manual_seed(crc32(text.encode())) for text in prompt]
            prompt_embeds = torch.stack([torch.randn(6, 24, generator=draw) for draw in draws])
            prompt_embeds = prompt_embeds.to(made.transformer.dtype)
        return prompt_embeds, made._prepare_text_ids(prompt_embeds)

    made.encode_prompt = encode_prompt
    return made


def zimage(scheduler=None, kind=diffusers.ZImagePipeline, **config):
    size = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    places = {"axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64], "cap_feat_dim": 8}
    return built(
        kind,
        transformer=lambda: shaken(diffusers.ZImageTransformer2DModel(**{**size, **places, **config})),
        scheduler=scheduler or flow(),
        vae=lambda: vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=lambda: qwen3(2),
        tokenizer=qwen_tokenizer(),
    )


def lumina2(scheduler=None, **config):
    """Its pipeline takes a VAE to halve three times."""
    size = {"sample_size": LATENT, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1}
    heads = {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "cap_feat_dim": TEXT}
    places = {"axes_dim_rope": (4, 2, 2), "axes_lens": (512, 16, 16)}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return built(
        diffusers.Lumina2Pipeline,
        transformer=lambda: shaken(diffusers.Lumina2Transformer2DModel(**{**size, **heads, **places, **config})),
        scheduler=scheduler or flow(),
        vae=lambda: vae(shift_factor=0.1, scaling_factor=1.5, block_out_channels=(8,) * 4, **blocks),
        text_encoder=gemma,
        tokenizer=gemma_tokenizer(),
    )


def pixart(kind=diffusers.PixArtSigmaPipeline, scheduler=None, **config):
    size = {"sample_size": LATENT, "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": 16}
    return built(
        kind,
        transformer=lambda: shaken(
            diffusers.PixArtTransformer2DModel(**{**size, **HEADS, "caption_channels": TEXT, **config})
        ),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(),
        vae=vae,
        text_encoder=t5,
        tokenizer=t5_tokenizer(),
    )


def dc():
    blocks = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8),
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), (5,)),
        }.items()
    }
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41, **blocks).eval()


def sana(scheduler=None, **config):
    size = {"sample_size": LATENT, "in_channels": 4, "out_channels": 4, "num_layers": 1, **HEADS}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    return built(
        diffusers.SanaPipeline,
        transformer=lambda: shaken(
            diffusers.SanaTransformer2DModel(**{**size, **cross, "caption_channels": TEXT, **config})
        ),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(**DPM),
        vae=dc,
        text_encoder=gemma,
        tokenizer=gemma_tokenizer(),
    )


def sprint(scheduler=None, **config):
    size = {"sample_size": 32, "in_channels": 4, "out_channels": 4, "num_layers": 2, **HEADS, "guidance_embeds": True}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    norms = {"caption_channels": TEXT, "qk_norm": "rms_norm_across_heads"}
    return built(
        diffusers.SanaSprintPipeline,
        transformer=lambda: shaken(diffusers.SanaTransformer2DModel(**{**size, **cross, **norms, **config})),
        scheduler=scheduler or diffusers.SCMScheduler(),
        vae=dc,
        text_encoder=gemma,
        tokenizer=gemma_tokenizer(),
    )


def umt5():
    config = {"d_model": TEXT, "d_kv": 8, "d_ff": TEXT, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=len(t5_vocabulary()), **config)).eval()


def wan(scheduler=None, experts=1, boundary_ratio=None, texts=False, **config):
    size = {"in_channels": 16, "out_channels": 16, "num_layers": 1, "ffn_dim": 32, "rope_max_seq_len": 32}
    heads = {"attention_head_dim": 12, "num_attention_heads": 2, "text_dim": TEXT, "freq_dim": 32}
    blocks = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}

    def transformer():
        return shaken(diffusers.WanTransformer3DModel(**{**size, **heads, **config}))

    return built(
        diffusers.WanPipeline,
        transformer=transformer,
        transformer_2=transformer if experts == 2 else None,
        boundary_ratio=boundary_ratio,
        scheduler=scheduler or diffusers.UniPCMultistepScheduler(**DPM),
        vae=lambda: diffusers.AutoencoderKLWan(**blocks, temperal_downsample=[False, True, True]).eval(),
        text_encoder=umt5 if texts else None,
        tokenizer=t5_tokenizer() if texts else None,
    )


def qwen(scheduler=None, guidance_embeds=False, texts=False, **config):
    size = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "axes_dims_rope": (8, 4, 4)}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TEXT}
    blocks = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    statistics = {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}
    return built(
        diffusers.QwenImagePipeline,
        transformer=lambda: shaken(
            diffusers.QwenImageTransformer2DModel(**{**size, **heads, "guidance_embeds": guidance_embeds, **config})
        ),
        scheduler=scheduler or flow(use_dynamic_shifting=True),
        vae=lambda: diffusers.AutoencoderKLQwenImage(**blocks, **statistics).eval(),
        text_encoder=qwen_vl if texts else None,
        tokenizer=qwen_tokenizer() if texts else None,
    )


def qwen_vl():
    text = {"vocab_size": 300, "hidden_size": TEXT, "intermediate_size": TEXT, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    eyes = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": TEXT, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eyes)).eval()
