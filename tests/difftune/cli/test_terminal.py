"""What a person sees: lines that fit, our sentences alone, nothing that other libraries say by themselves."""

import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from difftune.files import pictures
from difftune.pipelines import lora
from difftune.pipelines.engine import plan_for
from solvers.errors import Caution, UserError
from solvers.families.prompts import TOLD, unread
from tests.difftune.cli.test_cli import STEPS, call, refuse, succeed
from tests.support import dits, pipelines


def said(result):
    """The lines on stderr, except progress bars."""
    return [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_lists_fit_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (["methods"], ["rewards", "list"]):
        lines = succeed(*words).stdout.splitlines()
        assert len(lines) > 30 and max(map(len, lines)) <= columns, max(lines, key=len)
    assert max(map(len, lines)) > columns - 20 or columns == 200
    named = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert "tiny-clip" in named and "pickscore" in named


def test_what_libraries_say_is_shown_on_demand_alone(picture, monkeypatch):
    import difftune.evaluation.score

    read = difftune.evaluation.score.read_picture

    def chatty(path):
        warnings.warn("this function is deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("diffusers.models").warning("117 lines")
        warnings.warn("the scale is another one", Caution, stacklevel=1)
        return read(path)

    monkeypatch.setattr(difftune.evaluation.score, "read_picture", chatty)
    words = ["score", "--reward", "brightness", picture]
    assert said(succeed(*words)) == ["difftune: the scale is another one"]
    assert not logging.root.manager.disable
    with pytest.warns((FutureWarning, Caution), match="deprecated"):
        succeed(*words, "--verbose")


def test_run_says_nothing_of_the_libraries(model, tmp_path):
    words = ["--model", model, "--prompt", "red", "--output_dir", tmp_path / "a", *STEPS]
    assert said(succeed("sample", *words)) == []


def test_long_prompt_is_one_sentence(model, tmp_path):
    long = " ".join(["red circle"] * 60)
    for i, words in enumerate((["sample"], ["optimize", "--reward", "brightness", "--iterations", 1])):
        done = succeed(
            *words, "--model", model, "--prompt", long, "red", long, "--output_dir", tmp_path / str(i), *STEPS
        )
        (line,) = (line for line in said(done) if "does not read" in line)
        assert line.startswith("difftune: the model does not read all of 'red circle") and len(line) < 250
        assert "truncated" not in done.stderr and "Token indices" not in done.stderr


MAKES = {"sd": pipelines.sd, "sdxl": pipelines.sdxl, "sd3": dits.sd3, "flux": dits.flux, "pixart": dits.pixart}


@pytest.mark.parametrize("name", MAKES)
def test_what_is_not_read_is_the_end_of_the_prompt(name):
    """It changes nothing of what the pipeline encodes, and what is read does."""
    pipe = MAKES[name]()
    assert unread(pipe, "a red circle") == ""
    long = "red circle " * 400
    rest = unread(pipe, long + "blue")
    assert rest and "characters" in rest
    from solvers.latent import LatentModel

    TOLD.discard(pipe)
    with pytest.warns(Caution, match="does not read all of"):
        conds = [LatentModel(pipe).encode(long + word)["cond"] for word in ("blue", "green")]
    assert all(torch.equal(conds[0][key], conds[1][key]) for key in conds[0])


def saved_lora(pipe, folder):
    lora.add(pipe, rank=2)
    with torch.no_grad():
        for name, weight in lora.weights(lora.network_of(pipe)).items():
            weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    lora.save(pipe, folder)
    return folder


def test_lora_of_another_model_is_refused_in_one_sentence(model, tmp_path):
    foreign, own = saved_lora(dits.flux(), tmp_path / "flux"), saved_lora(pipelines.sd(), tmp_path / "sd")
    words = ["--model", model, "--prompt", "red", "--output_dir", tmp_path / "out", *STEPS]
    for given in ([foreign], [f"{own}=0.5", f"{foreign}=0.5"], [f"{foreign}=0.5", f"{own}=0.5"]):
        done = call("sample", *words, "--lora", *given)
        (line,) = said(done)
        assert done.exit_code == 2 and f"the LoRA of {foreign} does not fit this UNet2DConditionModel" in line
        assert "0 of its " in line and "tensors were used" in line
    for command in (["search", "fk", "--nfe_budget", 20, "--reward", "brightness"], ["compare"], ["eval"]):
        rest = [w for w in words if command != ["eval"] or w not in ("--prompt", "red")]
        done = call(*command, *rest, "--lora", foreign)
        assert done.exit_code == 2 and "0 of its " in said(done)[-1] and len(said(done)) == 1
    assert not (tmp_path / "out").exists()


def test_pixels_of_a_picture_have_a_limit(picture, tmp_path, monkeypatch):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 800)
    succeed("score", "--reward", "brightness", picture)
    refuse(1, "score", "--reward", "brightness", picture, tmp_path / "large.png", saying=["30 x 30 pixels", "resize"])


def test_info_calls_nothing_of_a_persons_own(tmp_path, monkeypatch):
    text = '''
def f(images, prompts):
    """Mine."""
    raise SystemError("called")
def g(images, prompts):
    raise SystemError("called")
g.differentiable = True
class H:
    differentiable = False
    def __init__(self):
        raise SystemError("made")
'''
    (tmp_path / "asked_about.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, gradient in {"f": "tried when it is loaded", "g": "yes", "H": "no"}.items():
        assert f"differentiable: {gradient}" in succeed("rewards", "info", f"asked_about:{name}").stdout
    refuse(2, "rewards", "info", "asked_about:nothing", saying=["has no 'nothing'"])
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    says = ["'asked_about:f' is not a reward", "SystemError: called"]
    refuse(2, "score", "--reward", "asked_about:f", picture, saying=says)


def test_budget_of_a_cpu_says_what_it_does_not_count(monkeypatch):
    def measure(limit):
        raise UserError("measured")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.warns(Caution, match="scratch of operators"), pytest.raises(UserError, match="measured"):
        plan_for("6GiB", None, 4, 1, 1, measure)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with warnings.catch_warnings(), pytest.raises(UserError, match="measured"):
        warnings.simplefilter("error")
        plan_for("6GiB", None, 4, 1, 1, measure)
