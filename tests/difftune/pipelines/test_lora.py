"""LoRA: what is saved loads in a fresh pipeline and gives the same output."""

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as conversions
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from difftune.errors import UserError
from difftune.pipelines import lora, lora_formats
from solvers.families.table import family_of
from solvers.latent import LatentModel
from tests.support import dits, pipelines
from tests.support.families import EVERY, slow_but


def perturbed(pipe, **options):
    """An adapter whose update is not zero."""
    for i, weight in enumerate(lora.add(pipe, **options).values()):
        weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return pipe


def output(pipe) -> torch.Tensor:
    inputs = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(2, 4, 8, 8, generator=inputs),
        torch.randn(2, 8, pipe.unet.config.cross_attention_dim, generator=inputs),
    )
    added = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return pipe.unet(x, 500, text, added_cond_kwargs=added).sample


@torch.no_grad()
def said(pipe) -> torch.Tensor:
    """What the denoiser says, of any family."""
    torch.manual_seed(3)
    model = LatentModel(pipe, EVERY[family_of(pipe).name].embedded)
    at = model.levels(4)[2]
    x = model.noise(2, [torch.Generator().manual_seed(i) for i in range(2)], 16, 16)
    return model.denoiser(x, at, model.encode(["red circle", "blue square"], height=16, width=16)["cond"]).eps


FEED_FORWARD = {
    "flux2": ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    **dict.fromkeys(("sana", "sana-sprint"), ("conv_inverted", "conv_point")),
    "zimage": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "lumina2": ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
}


@pytest.mark.parametrize("name", slow_but(EVERY, "sd", "sd3", "flux", "flux2", "zimage", "wan"))
@pytest.mark.parametrize("layout", lora.LAYOUTS)
@pytest.mark.sampled(3)
def test_every_layout_loads_whole_into_a_fresh_pipeline_of_every_family(tmp_path, name, layout):
    """alpha is not the rank; as many tensors are loaded as were saved."""
    torch.manual_seed(0)
    pipe = EVERY[name].make()
    torch.manual_seed(0)
    fresh = EVERY[name].make()
    base = said(fresh)
    assert torch.equal(base, said(pipe))
    perturbed(pipe, rank=2, alpha=8, layout=layout)
    path = lora.save(pipe, tmp_path, {k: v.clone() for k, v in lora.weights(lora.network_of(pipe)).items()})
    lora.attach(fresh, tmp_path)
    loaded = [key for key, _ in lora.network_of(fresh).named_parameters() if "lora" in key]
    assert len(loaded) == len(load_file(path)) == len(lora.weights(lora.network_of(pipe)))
    layers = {key.split(".lora_")[0] for key in load_file(path)}
    for part in FEED_FORWARD.get(name, ("net.0.proj", "net.2")):
        assert any(layer.endswith(f".{part}") for layer in layers) is (layout != "attention"), part
    assert any(layer.endswith(".to_q") for layer in layers)
    assert (said(fresh) - said(pipe)).abs().max() <= 1e-5
    assert (said(fresh) - base).abs().max() > 1e-3


def test_blocks_of_one_stream_are_trained_in_both_layouts():
    for layout in lora.LAYOUTS:
        names = lora.add(dits.flux2(), layout=layout)
        for layer in ("to_qkv_mlp_proj", "to_out"):
            assert f"single_transformer_blocks.0.attn.{layer}.lora_A.default.weight" in names


@pytest.mark.parametrize("make", [pipelines.sd, pipelines.sdxl])
@pytest.mark.parametrize("alpha", [None, 8])
def test_saved_adapter_loads_into_a_fresh_pipeline(tmp_path, make, alpha):
    pipe = perturbed(make(), rank=2, alpha=alpha)
    path = lora.save(pipe, tmp_path)
    fresh = make()
    base = output(fresh)
    fresh.load_lora_weights(tmp_path)
    loaded = [name for name, _ in fresh.unet.named_parameters() if "lora" in name]
    assert len(loaded) == len(load_file(path)) == len(lora.weights(pipe.unet))
    assert (output(fresh) - output(pipe)).abs().max() <= 1e-6
    assert (output(fresh) - base).abs().max() > 1e-3
    assert [p.name for p in tmp_path.iterdir()] == [lora.WEIGHTS]


@pytest.mark.parametrize("layout", lora.LAYOUTS)
def test_kohyas_file_is_the_same_adapter(tmp_path, layout):
    pipe = perturbed(pipelines.sd(), rank=2, alpha=8, layout=layout)
    file = lora.export_kohya(pipe, tmp_path / "kohya.safetensors")
    keys = load_file(file)
    assert len(keys) == 3 * len(lora.weights(pipe.unet)) // 2
    assert all(k.startswith("lora_unet_") and k.count(".") <= 2 for k in keys)
    fresh = pipelines.sd()
    fresh.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    assert (output(fresh) - output(pipe)).abs().max() <= 1e-5
    with pytest.raises(UserError, match="kohya's layout is of UNets and of sd3, .* this is a LoRA of pixart: keep pyt"):
        lora.export_kohya(perturbed(dits.pixart(), rank=2), tmp_path / "no.safetensors")


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_a_folder_is_exported_without_its_model(tmp_path, layout):
    pipe = perturbed(pipelines.sd(), rank=2, alpha=8)
    lora.save(pipe, tmp_path)
    file = lora_formats.export(tmp_path, tmp_path / "out.safetensors", layout)
    theirs = load_file(lora.export_kohya(pipe, tmp_path / "kohya.safetensors"))
    mine = load_file(file)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_transformer_is_exported_for_comfyui_by_diffusers_names(tmp_path):
    pipe = dits.pixart()
    trained = lora.add(pipe, rank=2, alpha=8)
    lora.save(pipe, tmp_path)
    found = load_file(lora_formats.export(tmp_path, tmp_path / "out.safetensors", "comfyui"))
    layers = {key.partition(".lora_")[0] for key in found if "lora_A" in key}
    assert len(found) == 3 * len(layers) == 3 * len(trained) // 2
    assert all(key.startswith("transformer.") and float(found[f"{key}.alpha"]) == 8 for key in layers)
    with pytest.raises(UserError, match="this is a LoRA of pixart: keep pytorch_lora_weights"):
        lora_formats.export(tmp_path, tmp_path / "no.safetensors", "kohya")
    with pytest.raises(UserError, match="no is the file to write: give it a name that ends in .safetensors"):
        lora_formats.export(tmp_path, "no", "comfyui")
    with pytest.raises(UserError, match="is no LoRA of difftune train"):
        lora_formats.export(tmp_path / "nowhere", "no.safetensors", "comfyui")


@pytest.mark.parametrize("family", ("wan", "sana", "sana-sprint", "lumina2", "chroma"))
def test_a_family_whose_names_in_comfyui_are_not_known_is_refused(family):
    adapter = adapter_of_flux(8)._replace(family=family)
    with pytest.raises(UserError, match=f"are known of UNets and of sd3, flux, .* this is a LoRA of {family}: keep"):
        lora_formats.LAYOUTS["comfyui"](adapter)


def updates(tensors, scale=lambda layer: 1.0) -> dict[str, torch.Tensor]:
    """alpha / rank B A v of each layer, by diffusers' names, for one and the same v."""
    layers = {key.partition(".lora_")[0] for key in tensors if "lora_" in key}
    sides = {layer: [tensors[f"{layer}.lora_{side}.weight"] for side in "AB"] for layer in layers}
    made = {layer: scale(layer) * b @ (a @ torch.linspace(-1, 1, a.shape[1])) for layer, (a, b) in sides.items()}
    return {layer.removeprefix("transformer."): update for layer, update in made.items() if update.any()}


def adapter_of_flux(wide=3072, rank=2):
    """Layers of FLUX.1's own width, which diffusers' reader of the layout is made for."""
    draw = torch.Generator().manual_seed(0)
    square = [f"transformer_blocks.0.attn.{name}" for name in (*lora.ATTENTION, *lora.JOINT)]
    square += [f"single_transformer_blocks.1.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    sizes = {layer: (wide, wide) for layer in (*square, "single_transformer_blocks.0.attn.to_q")}
    sizes |= {
        "single_transformer_blocks.0.proj_mlp": (4 * wide, wide),
        "transformer_blocks.0.ff.net.2": (wide, 4 * wide),
    }
    sizes |= {"single_transformer_blocks.0.proj_out": (wide, 5 * wide)}
    tensors = {}
    for layer, (out, into) in sizes.items():
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, into, generator=draw)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, rank, generator=draw)
    settings = {"lora_alpha": 8, "alpha_pattern": {"to_k": 3, "proj_mlp": 5}}
    return lora_formats.Adapter("transformer", "flux", tensors, settings)


def test_kohyas_file_of_flux_is_the_same_update():
    """By diffusers' own reader of the layout, which takes the joined layers apart again."""
    adapter = adapter_of_flux()
    found = updates(conversions._convert_kohya_flux_lora_to_diffusers(lora_formats.kohya(adapter)))
    expected = updates(adapter.tensors, lambda a: lora_formats.alpha_of(a, adapter.tensors, adapter.settings) / 2)
    assert found.keys() == expected.keys() and len(found) == 15
    for layer, update in expected.items():
        torch.testing.assert_close(found[layer], update, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["flux2", "qwen", "zimage"])
def test_kohyas_file_of_a_transformer_loads_into_its_pipeline(tmp_path, name):
    torch.manual_seed(0)
    pipe = EVERY[name].make()
    torch.manual_seed(0)
    fresh = EVERY[name].make()
    perturbed(pipe, rank=2, alpha=8, layout="attention+ff+conv")
    file = lora.export_kohya(pipe, tmp_path / "kohya.safetensors")
    keys = load_file(file)
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in keys)
    fused = [f"lora_unet_double_blocks_0_{side}_mlp_{i}.alpha" for side in ("img", "txt") for i in (0, 2)]
    assert name != "flux2" or set(fused) <= keys.keys()
    base = said(fresh)
    fresh.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    assert (said(fresh) - said(pipe)).abs().max() <= 2e-5 and (said(fresh) - base).abs().max() > 1e-3


def test_kohyas_file_of_sd3_has_the_published_layers():
    """Which diffusers does not read: by the layout's names, and the update of each part of a joined layer."""
    pipe = dits.sd3(qk_norm="rms_norm", dual_attention_layers=(0,))
    perturbed(pipe, rank=2, alpha=8, layout="attention+ff+conv")
    own = lora.adapter_of(pipe.transformer, "default")
    settings = pipe.transformer.peft_config["default"].to_dict()
    found = lora_formats.kohya(lora_formats.Adapter("transformer", "sd3", own, settings))
    names, block = {key.partition(".")[0] for key in found}, "lora_unet_joint_blocks_0"
    x = [f"{block}_x_block_{part}" for part in ("attn_qkv", "attn_proj", "attn2_qkv", "mlp_fc1", "mlp_fc2")]
    context = [f"{block}_context_block_{part}" for part in ("attn_qkv", "attn_proj", "mlp_fc1")]
    assert {*x, *context, "lora_unet_joint_blocks_1_context_block_attn_qkv", "lora_unet_final_layer_linear"} <= names
    assert "lora_unet_joint_blocks_1_context_block_attn_proj" not in names  # the last block has no use for the text
    down, up, alpha = (found[f"{x[0]}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    joined = alpha / len(down) * up @ (down @ torch.linspace(-1, 1, down.shape[1]))
    expected = updates(own, lambda layer: 8 / 2)
    for part, name in zip(joined.chunk(3), ("to_q", "to_k", "to_v"), strict=True):
        torch.testing.assert_close(part, expected[f"transformer_blocks.0.attn.{name}"])


def delta(pipe, name: str) -> torch.Tensor:
    """B A of one layer, as it is applied: with shares and alpha / rank."""
    layer = pipe.unet.get_submodule(name)
    return sum(layer.scaling[a] * layer.lora_B[a].weight @ layer.lora_A[a].weight for a in layer.active_adapters)


def test_adapters_are_mixed_by_shares(tmp_path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    deltas = []
    for i, (rank, alpha) in enumerate([(2, 8), (3, None)]):
        pipe = perturbed(pipelines.sd(), rank=rank, alpha=alpha)
        lora.save(pipe, tmp_path / str(i))
        deltas.append(delta(pipe, layer))
    for shares in ((0.25, 0.75), (1.0, 0.0)):
        mixed = pipelines.sd()
        lora.mix(mixed, {str(tmp_path / str(i)): share for i, share in enumerate(shares)})
        expected = sum(share * d for share, d in zip(shares, deltas, strict=True))
        assert torch.allclose(delta(mixed, layer), expected, atol=1e-7)
    alone = pipelines.sd()
    lora.attach(alone, tmp_path / "0")
    assert (output(mixed) - output(alone)).abs().max() <= 1e-5


def spread_out(pipe):
    """An adapter of peft's own, with ranks and alphas that differ from layer to layer."""
    patterns = {"rank_pattern": {"to_v": 3, "mid_block.*to_k": 1}, "alpha_pattern": {"to_v": 16, "to_out.0": 5}}
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=list(lora.ATTENTION), **patterns)
    pipe.unet.add_adapter(settings, "mine")
    for i, weight in enumerate(lora.weights(pipe.unet).values()):
        weight.data = 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return pipe


@pytest.mark.parametrize("layers", ["plain", "patterns", "rslora"])
def test_an_adapter_of_any_name_is_saved_exported_and_mixed(tmp_path, layers):
    """As `pipe.load_lora_weights` names it, or its maker; each layer keeps its own rank and alpha."""
    made = perturbed(pipelines.sd(), rank=2, alpha=6) if layers == "plain" else spread_out(pipelines.sd())
    if layers == "rslora":
        made = pipelines.sd()
        made.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], use_rslora=True), "mine")
        for weight in lora.weights(made.unet).values():
            weight.data += 0.2
    expected, base = output(made), output(pipelines.sd())
    assert (expected - base).abs().max() > 1e-3
    lora.save(made, tmp_path / "m")
    loaded = pipelines.sd()
    loaded.load_lora_weights(tmp_path / "m")
    assert list(loaded.unet.peft_config) == ["default_0"] and torch.allclose(output(loaded), expected, atol=1e-5)
    lora.export_kohya(loaded, tmp_path / "k" / "k.safetensors")
    exported = pipelines.sd()
    exported.load_lora_weights(tmp_path / "k", weight_name="k.safetensors")
    assert torch.allclose(output(exported), expected, atol=1e-5)
    lora.save(loaded, tmp_path / "again")
    again = pipelines.sd()
    lora.attach(again, tmp_path / "again")
    assert torch.allclose(output(again), expected, atol=1e-5)
    lora.mix(loaded, {str(tmp_path / "m"): 0.0})
    assert torch.allclose(output(loaded), base, atol=1e-5)  # what was loaded before is off
    lora.mix(loaded, {str(tmp_path / "m"): 0.25, str(tmp_path / "again"): 0.75})
    assert torch.allclose(output(loaded), expected, atol=1e-5) and len(loaded.unet.peft_config) == 4
    with pytest.raises(UserError, match="has the adapters default_0, .*: give one of them as adapter_name"):
        lora.export_kohya(loaded, tmp_path / "k" / "mixed.safetensors")  # which of them is open
    one = lora.export_kohya(loaded, tmp_path / "k" / "one.safetensors", "default_0")
    assert one.read_bytes() == (tmp_path / "k" / "k.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["0", "to_q", "weight", "lora_A"])
def test_an_adapter_beside_one_that_is_named_as_a_part_of_a_layer_is_whole(tmp_path, name):
    """peft's own function leaves out the layers whose names have that part."""
    lora.save(perturbed(pipelines.sd(), rank=2, alpha=6), tmp_path / "m")
    expected, pipe = output(lora_of(tmp_path / "m")), pipelines.sd()
    pipe.load_lora_weights(tmp_path / "m", adapter_name=name)
    lora.mix(pipe, {str(tmp_path / "m"): 1.0})
    assert torch.allclose(output(pipe), expected, atol=1e-5)
    for adapter in (name, "default"):
        lora.save(pipe, tmp_path / adapter, adapter_name=adapter)
        assert torch.allclose(output(lora_of(tmp_path / adapter)), expected, atol=1e-5)
    with pytest.raises(UserError, match="an adapter is named 'a.b': torch allows no dot in a name"):
        lora.attach(pipe, tmp_path / "m", "a.b")


def lora_of(folder):
    pipe = pipelines.sd()
    lora.attach(pipe, folder)
    return pipe


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_an_adapters_weights_have_pefts_own_keys(more):
    pipe = pipelines.sd()
    targets = list(lora.LAYOUTS["attention" if more else "attention+ff+conv"])
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more), "mine")
    found, theirs = lora.adapter_of(pipe.unet, "mine"), get_peft_model_state_dict(pipe.unet, adapter_name="mine")
    assert found.keys() == theirs.keys() and all(torch.equal(found[key], theirs[key]) for key in theirs)


def test_an_open_choice_of_adapters_is_named(tmp_path):
    pipe = perturbed(pipelines.sd(), rank=2)
    lora.save(pipe, tmp_path)
    assert [lora.attach(pipe, tmp_path), lora.attach(pipe, tmp_path)] == ["default_1", "default_2"]
    pipe.unet.set_adapters(["default", "default_2"])
    with pytest.raises(
        UserError, match="has the adapters default, default_1, default_2: give one of them as adapter_n"
    ):
        lora.save(pipe, tmp_path / "no")
    with pytest.raises(
        UserError, match="no adapter 'other' in the UNet2DConditionModel: it has default, default_1, def"
    ):
        lora.export_kohya(pipe, tmp_path / "no.safetensors", adapter_name="other")
    assert lora.save(pipe, tmp_path / "one", adapter_name="default_1").is_file()
    pipe.unet.set_adapters("default_2")
    assert lora.chosen(pipe.unet) == "default_2"
    with pytest.raises(UserError, match="has the adapters none"):
        lora.save(pipelines.sd(), tmp_path / "no")
    dora = pipelines.sd()
    dora.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), "d")
    with pytest.raises(UserError, match="has no magnitudes, and the adapter is of DoRA"):
        lora.export_kohya(dora, tmp_path / "no.safetensors")


def test_weights_are_lent_and_come_back(tmp_path):
    pipe = perturbed(pipelines.sd(), rank=2)
    own = {k: v.clone() for k, v in lora.weights(pipe.unet).items()}
    before = output(pipe)
    with pytest.raises(KeyError), lora.lent(pipe.unet, {k: torch.zeros_like(v) for k, v in own.items()}):
        assert torch.equal(output(pipe), output(pipelines.sd()))
        raise KeyError
    assert all(torch.equal(v, own[k]) for k, v in lora.weights(pipe.unet).items())
    assert torch.equal(output(pipe), before)


def test_a_new_adapter_changes_nothing_and_is_seeded():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pipe, again, other = pipelines.sd(), pipelines.sd(), pipelines.sd()
    base = output(pipe)
    weights, same, different = lora.add(pipe, seed=1), lora.add(again, seed=1), lora.add(other, seed=2)
    assert torch.equal(output(pipe), base)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[k], same[k]) for k in weights)
    assert not all(torch.equal(weights[k], different[k]) for k in weights)


def test_only_the_adapter_is_trainable_and_it_is_float32():
    pipe = pipelines.sd()
    pipe.to(dtype=torch.bfloat16)
    weights = lora.add(pipe, rank=4)
    layers = {name.rsplit(".lora_", 1)[0].rsplit("attn", 1)[1][2:] for name in weights}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {w.dtype for w in weights.values()} == {torch.float32}
    trained = [
        n for c in ("unet", "vae", "text_encoder") for n, p in pipe.components[c].named_parameters() if p.requires_grad
    ]
    assert trained == list(weights)


def test_sd15_has_the_papers_number_of_weights():
    """Rank 4 on the attention of Stable Diffusion 1.5: 797,184, from its published sizes, on no device."""
    with torch.device("meta"):
        pipe = pipelines.sd(unet_config={"sample_size": 64, "layers_per_block": 2, "norm_num_groups": 32,
            "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3})  # fmt: skip
        assert sum(w.numel() for w in lora.add(pipe, rank=4).values()) == 797_184


def test_a_second_adapter_and_foreign_weights_are_refused():
    pipe = pipelines.sd()
    weights = lora.add(pipe, rank=2)
    with pytest.raises(UserError, match="adapters already"):
        lora.add(pipe)
    with pytest.raises(UserError, match="not of this model, layout and rank"):
        lora.load(pipe.unet, {name: weight[:1] for name, weight in weights.items()})
