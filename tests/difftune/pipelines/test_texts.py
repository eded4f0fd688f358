"""What is done once: a prompt's encoding in a whole run, the parts of a method in all steps of a search."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from difftune.configs.recipes import AlignPropConfig, DDPOConfig
from difftune.pipelines.texts import Texts
from difftune.recipes import train
from difftune.reno.optimizer import ReNO
from difftune.search_runs import problem as adapters
from difftune.search_runs.search import search
from guidance.methods.catalogue import CFG, PerpNeg
from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support.pipelines import sd, text_encoder

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


def adapter_changed(pipe, name="other"):
    for layer in (m for m in pipe.text_encoder.modules() if isinstance(m, BaseTunerLayer)):
        layer.set_adapter(name)


@pytest.mark.parametrize("change", [weight_written, encoder_replaced, adapter_changed])
def test_prompts_are_encoded_anew_after_a_text_encoder_changed(change):
    pipe = sd()
    for name in ("one", "other"):
        settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        inject_adapter_in_model(settings, pipe.text_encoder, name)
    adapter_changed(pipe, "one")
    model, texts = LatentModel(pipe), Texts()
    before = texts(model, PROMPTS)["cond"]["encoder_hidden_states"]
    assert torch.equal(texts(model, PROMPTS)["cond"]["encoder_hidden_states"], before)
    change(pipe)
    after = texts(model, PROMPTS)["cond"]["encoder_hidden_states"]
    assert not torch.equal(after, before)
    assert torch.equal(after, Texts()(model, PROMPTS)["cond"]["encoder_hidden_states"])


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
