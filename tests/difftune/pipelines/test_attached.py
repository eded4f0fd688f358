"""`attach` with methods whose parts are text or the name of a model."""

import pytest
import torch

from difftune import ReNO, models, search
from difftune.errors import UserError
from difftune.pipelines.attached import attach
from difftune.pipelines.method_parts import equip
from guidance import attach as core
from guidance.methods.catalogue import CFG, NAG, NASA, AutoGuidance, Interval, MultiCondition, PerpNeg

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return models.load("tiny")


def drawn(pipe, attached):
    with attached:
        return pipe(**CALL, latents=torch.ones(1, 4, 8, 8)).images


@pytest.mark.parametrize(
    "method",
    [
        NAG(4.0, negative="a blue square"),
        NASA(0.3, negative="a blue square"),
        PerpNeg(4.0, negatives=("a blue square", "a green star")),
        MultiCondition(4.0, conds=("cond", "a blue square")),
        AutoGuidance(2.0),
        Interval(PerpNeg(4.0, negatives=("a blue square",)), low=0.1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_text_is_encoded_by_the_pipeline(pipe, method):
    found = equip(pipe, method)
    expected = drawn(pipe, core.attach(pipe, found.method(()), found.networks))
    assert torch.equal(drawn(pipe, attach(pipe, method)), expected)
    assert not torch.equal(drawn(pipe, attach(pipe, CFG(4.0))), expected)


def test_a_network_that_is_given_is_taken(pipe):
    other = pipe.unet
    handle = attach(pipe, AutoGuidance(2.0, network="mine"), {"mine": other})
    assert handle.networks == {"mine": other}
    handle.detach()


def test_what_is_missing_is_named(pipe):
    with pytest.raises(UserError, match=r"in Python NAG\(negative='a dog'\)"):
        attach(pipe, NAG())
    with pytest.raises(UserError, match=r"in Python PerpNeg\(negatives="):
        attach(pipe, PerpNeg())
    with pytest.raises(UserError, match=r"'tiny' is the name of a model: load it first, as in pipe = load_model"):
        attach("tiny", CFG())
    with pytest.raises(UserError, match="load it first"):
        ReNO("tiny", reward="saturation")
    with pytest.raises(UserError, match="load it first"):
        search("tiny", "a red circle", reward="saturation")
