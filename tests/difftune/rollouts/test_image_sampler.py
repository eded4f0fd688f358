"""What the sampler of the recipes reuses between optimiser steps."""

import torch

from difftune.rollouts.image_sampler import Texts
from solvers.latent import LatentModel
from tests.support.pipelines import sd


def test_a_prompt_is_encoded_once_and_its_bits_are_its_own():
    model, texts = LatentModel(sd()), Texts()
    encoded = []
    model.pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    first = texts(model, ["red", "blue", "red"])
    once = len(encoded)
    assert set(encoded) == {1} and list(texts.known) == ["blue", "red"]
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
    assert list(texts.known) == ["red", "green"]
    assert len(texts(model, ["red", "blue", "green"])["cond"]["encoder_hidden_states"]) == 3
