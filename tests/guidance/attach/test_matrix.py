"""Every method on every family, as the matrix of docs/guidance.md has it: a run leaves nothing for the next one."""

from copy import deepcopy

import pytest
import torch

from guidance.attach.handle import attach
from guidance.methods.catalogue import GUIDANCE
from guidance.methods.linear_ag import LinearFit
from guidance.methods.scales import time
from solvers.families import table
from solvers.families.zimage import padded
from tests.guidance.methods.test_conformance import FAMILY, KINDS, STEPS, Spy, pipe_of, run
from tests.support.benches import script
from tests.support.dits import shaken

JOINT = ("flux", "flux2", "sd3", "qwen", "chroma", "wan", "zimage")
PATCHES = {kind: ("pag", "slg") if kind in ("pixart-sigma", "sana") else ("slg",) for kind, _ in FAMILY}
PATCHES |= dict.fromkeys(JOINT, ("slg", "pag", "seg", "nag"))
PATCHES |= dict.fromkeys(("sd", "sdxl"), ("pag", "slg", "seg", "nasa", "nag"))
FLOWS = {kind for kind, case in FAMILY if case.startswith("flow")}
RULED = {"qwen": ("QwenImagePipeline", ("cfgpp", "cfg-mp", "nag")), "lumina2": ("Lumina2Pipeline", ("cfgpp", "cfg-mp"))}


def without_patch(kind: str, name: str, patch: str) -> str:
    """What is said of a method whose patch the family lacks."""
    known, method = ", ".join(PATCHES[kind]), GUIDANCE[name].__name__
    return f"{method} does not go here: family {kind.partition('-')[0]} has no patch {patch!r}; known: {known}"


def without_prediction(kind: str, name: str) -> str:
    """What is said of a method that has nothing for what the pipeline does to its guided prediction."""
    after, pipe = table.FAMILIES[kind].after, RULED[kind][0]
    return f"{GUIDANCE[name].__name__} has no guided prediction for {pipe}'s {after.name}: {after.remedy}"


REFUSED = {
    (kind, name): without_patch(kind, name, name)
    for kind, known in PATCHES.items()
    for name in PATCHES["sd"]
    if name not in known
}
REFUSED |= {(kind, "stg"): without_patch(kind, "stg", "pag") for kind in PATCHES if (kind, "pag") in REFUSED}
REFUSED |= {(kind, name): without_prediction(kind, name) for kind, (_, names) in RULED.items() for name in names}
METHODS = tuple(name for name in GUIDANCE if name != "null-text")
TESTED = tuple(kind for kind, _ in FAMILY)
PAIRS = [(kind, case, name) for kind, case in FAMILY for name in METHODS]


def classify(x0):
    return x0.flatten(1)[:, :3].float()


def condition(texts):
    """Texts (L, D), which are of one length unless they come in a list, as a batch."""
    return padded(texts) if isinstance(texts, list) else {"encoder_hidden_states": texts}


def example(kind, name, times):
    """The method with what it needs on two prompts or on one."""
    text = KINDS[kind].texts["prompt_embeds"]
    last = text[1:].flip(1) if isinstance(text, torch.Tensor) else [text[1].flip(0)]
    other, negative = condition(last), condition(text[1:])["encoder_hidden_states"]
    fit = LinearFit(times, tuple((0.9,) + (0.1,) * 2 * i for i in range(STEPS)))
    options = {
        "ag": {"threshold": -1.0, "min_cfg_steps": 2},
        "linear-ag": {"fit": fit},
        "gfcg": {
            "classify": classify,
            "classes": condition(torch.cat([text, last]) if isinstance(text, torch.Tensor) else text + last),
            "target": torch.tensor(0),
            "tolerance": 0.0,
        },
        "interval": {"low": 0.0, "high": 5.0},
        "classifier": {"classify": classify, "target": torch.tensor(0), "scale": 0.1},
        "cfg-zero": {"zero_steps": int(kind in FLOWS)},
        "fbg": {"delta": -1.0, "tau": 0.01},
        "dynamic": {"scorers": (lambda x0: x0.flatten(1).sum(1), lambda x0: x0.flatten(1).std(1))},
        "perpneg": {"negatives": (other,)},
        "multi": {"conds": ("cond", other), "scales": (3.0, 1.0)},
        "nasa": {"negative": negative},
        "nag": {"negative": negative},
    }
    return GUIDANCE[name](**options.get(name, {}))


def weak_of(pipe):
    name = table.family_of(pipe).denoisers[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return shaken(deepcopy(pipe.components[name]), 0.05)


@pytest.mark.filterwarnings("ignore:.*guides with its own scale")
@pytest.mark.parametrize("kind, case, name", PAIRS)
@pytest.mark.sampled(3)
def test_runs_are_alike_whatever_ran_before(kind, case, name):
    """Two runs with one seed are bit-identical, also after a run of another batch size; and they are guided."""
    pipe, seen = pipe_of(kind, case), []
    with attach(pipe, Spy(seen)):
        stock = run(kind, pipe)
    method = example(kind, name, tuple(time(at) for _, at in seen))
    one = {key: value[:1] for key, value in KINDS[kind].texts.items()}
    with attach(pipe, method, {"weak": weak_of(pipe)}) as handle:
        if (kind, name) in REFUSED:
            with pytest.raises(ValueError) as error:
                run(kind, pipe)
            assert str(error.value) == REFUSED[kind, name]
            return
        first, nfe = run(kind, pipe), handle.nfe
        assert sum(handle.branches.values()) == nfe
        alone = run(kind, pipe, **one)
        again = run(kind, pipe)
    assert torch.equal(first, again) and handle.nfe == nfe and bool(first.isfinite().all())
    assert len(alone) == 1 and bool(alone.isfinite().all())
    assert not torch.allclose(first, stock, atol=1e-4)


def test_the_page_is_made_of_these_tables():
    with script("make_matrix") as made:
        expected = made.page(TESTED, METHODS, REFUSED)
        assert made.PAGE.read_text() == expected, "python scripts/make_matrix.py writes the page anew"
