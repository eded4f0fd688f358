"""What is done once: a prompt's encoding in a whole run, the parts of a method in all steps of a search."""

import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from difftune.configs.recipes import AlignPropConfig, DDPOConfig, DPOConfig, KTOConfig
from difftune.pipelines.texts import Texts
from difftune.recipes import train
from difftune.reno import objective
from difftune.reno.optimizer import ReNO
from difftune.rollouts.file_latents import FileLatents
from difftune.search_runs import problem as adapters
from difftune.search_runs.search import search
from guidance.methods.catalogue import CFG, PerpNeg
from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support.pipelines import sd, text_encoder, tokenizer

PROMPTS = ["red circle", "blue square"]


def counted(pipe):
    """The rows of each call of the text encoder, as they come."""
    encoded = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    return encoded


def test_a_prompt_is_encoded_once_and_its_bits_are_its_own():
    model, texts = LatentModel(sd()), Texts()
    encoded = counted(model.pipe)
    first = texts(model, ["red", "blue", "red"])
    once = len(encoded)
    assert set(encoded) == {1} and [text for text, *_ in texts.known] == ["blue", "red"]
    again = texts(model, ["blue"])
    assert len(encoded) == once
    for name in ("cond", "uncond"):
        found = first[name]["encoder_hidden_states"]
        assert torch.equal(found[1:2], again[name]["encoder_hidden_states"]) and torch.equal(found[0], found[2])
        together = model.encode(["red", "blue", "red"])[name]["encoder_hidden_states"]
        assert torch.allclose(found, together, atol=1e-5)


def test_no_more_prompts_are_kept_than_there_is_room_for():
    model = LatentModel(sd())
    size = sum(value.nbytes for cond in model.encode("red").values() for value in cond.values())
    texts = Texts(room=2 * size)
    texts(model, ["red", "blue", "red", "green"])
    assert [text for text, *_ in texts.known] == ["red", "green"]
    assert len(texts(model, ["red", "blue", "green"])["cond"]["encoder_hidden_states"]) == 3


def weight_written(pipe):
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(-1)


def encoder_replaced(pipe):
    pipe.text_encoder = text_encoder()


def adapted(pipe, name):
    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    inject_adapter_in_model(settings, pipe.text_encoder, name)


def adapter_changed(pipe, name="other"):
    for layer in (m for m in pipe.text_encoder.modules() if isinstance(m, BaseTunerLayer)):
        layer.set_adapter(name)


def cast(pipe):
    pipe.to(torch.bfloat16)


def parameter_replaced(pipe):
    """By another with as many writes."""
    words = pipe.text_encoder.get_input_embeddings()
    other = torch.nn.Parameter(-words.weight.detach())
    with torch.no_grad():
        while other._version < words.weight._version:
            other.mul_(1)
    words.weight = other


def data_replaced(pipe):
    weight = pipe.text_encoder.get_input_embeddings().weight
    weight.data = -weight.data


def data_written(pipe):
    pipe.text_encoder.get_input_embeddings().weight.data.neg_()


def adapter_reloaded(pipe):
    """Others under the same names."""
    for name in ("one", "other"):
        for layer in (m for m in pipe.text_encoder.modules() if isinstance(m, BaseTunerLayer)):
            layer.delete_adapter(name)
    for name in ("one", "other"):
        adapted(pipe, name)
    adapter_changed(pipe, "one")


CHANGES = [weight_written, encoder_replaced, adapter_changed, cast, parameter_replaced]
CHANGES += [data_replaced, data_written, adapter_reloaded]


@pytest.mark.parametrize("change", CHANGES)
def test_prompts_are_encoded_anew_after_a_text_encoder_changed(change):
    pipe = sd()
    for name in ("one", "other"):
        adapted(pipe, name)
    adapter_changed(pipe, "one")
    model, texts = LatentModel(pipe), Texts()
    before = texts(model, PROMPTS)["cond"]["encoder_hidden_states"]
    assert torch.equal(texts(model, PROMPTS)["cond"]["encoder_hidden_states"], before)
    change(pipe)
    after = texts(model, PROMPTS)["cond"]["encoder_hidden_states"]
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert torch.equal(after, Texts()(model, PROMPTS)["cond"]["encoder_hidden_states"])


def tokenizer_extended(pipe):
    pipe.tokenizer.add_tokens(["purple"])


def tokenizer_replaced(pipe):
    pipe.tokenizer = tokenizer()


@pytest.mark.parametrize("change", [tokenizer_extended, tokenizer_replaced])
def test_prompts_are_encoded_anew_after_a_tokenizer_changed(change):
    model, texts = LatentModel(sd()), Texts()
    encoded = counted(model.pipe)
    for expected in (2, 2):  # the prompt and the empty one
        texts(model, ["red"])
        assert len(encoded) == expected
    change(model.pipe)
    texts(model, ["red"])
    assert len(encoded) == 4


def test_images_of_another_size_have_conditions_of_their_own():
    model, texts = LatentModel(sd()), Texts()
    texts(model, ["red"])
    texts(model, ["red"], 32, 32)
    texts(model, ["red"], *model.size())
    assert len(texts.known) == 2


@pytest.mark.parametrize("config", [AlignPropConfig, DDPOConfig])
def test_a_recipe_encodes_each_prompt_once(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    pipe = sd()
    encoded = counted(pipe)
    settings = config(
        prompts=str(tmp_path / "prompts.txt"), max_train_steps=2, train_batch_size=2, num_inference_steps=1
    )
    assert len([*train(settings, None, pipe, Brightness())]) == 2
    assert encoded == [1] * 4  # each with the empty prompt


def test_reno_encodes_each_prompt_once_whatever_is_planned_and_resumed():
    pipe = sd()
    reno, encoded = ReNO(pipe, Brightness(), progress=False), counted(pipe)
    reno.planned(PROMPTS)
    lives = [*reno.iterate([*PROMPTS, PROMPTS[0]], 2)]
    again = reno.optimize(PROMPTS, 2, seeds_per_prompt=2)
    assert encoded == [1] * 4 and len(lives) == 2
    alone = ReNO(pipe, Brightness(), progress=False).optimize(PROMPTS, 2, seeds_per_prompt=2)
    assert torch.equal(again.images, alone.images) and torch.equal(again.noises, alone.noises)


def test_a_search_encodes_and_sets_up_once_and_runs_all_prompts_in_one_batch(monkeypatch):
    """Its guidance has a negative prompt; each of the three steps is one call of the network, of all particles."""
    pipe, made = sd(), []
    encoded, rows = counted(pipe), []
    build = adapters.guided_by
    monkeypatch.setattr(adapters, "guided_by", lambda *a, **k: made.append(a) or build(*a, **k))
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    method = PerpNeg(negatives=("red",))
    settings = {"particles": 2, "num_inference_steps": 3, "progress": False, "guidance": method}
    found = search(pipe, PROMPTS, "fk", Brightness(), None, **settings).run()
    assert encoded == [2, 2, 1, 1] and len(made) == 3  # the guided prediction and those of two experts
    assert rows == [12] * 3 and found.nfe.tolist() == [18, 18]


def test_what_was_set_up_once_gives_the_bits_of_what_is_set_up_at_each_call(monkeypatch):
    def found():
        settings = {"particles": 2, "num_inference_steps": 3, "progress": False, "guidance": CFG(3.0)}
        return search(sd(), PROMPTS, "fk", Brightness(), None, **settings).run()

    once = found()
    predictor = adapters.Adapter.predictor
    monkeypatch.setattr(
        adapters.Adapter,
        "predictor",
        lambda self, equipped, conds: lambda groups: predictor(self, equipped, conds)(groups),
    )
    anew = found()
    assert torch.equal(once.latents, anew.latents) and torch.equal(once.rewards, anew.rewards)


@pytest.mark.parametrize("config", [DPOConfig, pytest.param(KTOConfig, marks=pytest.mark.slow)])
def test_labelled_pictures_and_their_prompts_are_encoded_once_a_run(config, tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    pairs = [{"prompt": prompt, "chosen": "red.png", "rejected": "blue.png"} for prompt in PROMPTS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    pipe, pictures = sd(), []
    encoded = counted(pipe)
    pipe.vae.encoder.register_forward_pre_hook(lambda module, args: pictures.append(len(args[0])))
    labels = {"labels": str(tmp_path / "pairs.jsonl"), "train_batch_size": 2 if config is DPOConfig else 4}
    settings = config(max_train_steps=3, num_inference_steps=1, learning_rate=1e-3, **labels)
    assert len([*train(settings, None, pipe)]) == 3
    assert pictures == [1, 1] and encoded == [1] * 4


def test_no_more_pictures_are_kept_than_there_is_room_for(tmp_path):
    files = [tmp_path / f"{name}.png" for name in ("red", "blue", "green")]
    for file in files:
        Image.new("RGB", (16, 16), file.stem).save(file)
    model = LatentModel(sd())
    latents = FileLatents(room=2 * 4 * 8 * 8 * 4)
    found = latents(model, files)
    assert list(latents.known) == files[1:] and found.shape == (3, 4, 8, 8)
    assert torch.equal(latents(model, files[:1]), found[:1])


def test_an_optimised_noise_looks_up_its_networks_once(monkeypatch):
    made, build = [], objective.guided_by
    monkeypatch.setattr(objective, "guided_by", lambda *given: made.append(given) or build(*given))
    ReNO(sd(), Brightness(), progress=False).optimize(PROMPTS[:1], 2)
    assert len(made) == 1
