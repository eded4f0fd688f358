"""Every method from the command line, methods inside methods, and methods side by side."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from difftune.cli.program import cli
from difftune.errors import UserError
from difftune.evaluation.compare import Cell, at_cfg_scale, caption, draw_sheet
from difftune.lookup import guidance_named, takes_scale
from difftune.pipelines import method_parts
from difftune.pipelines.generate import Pictures
from difftune.pipelines.method_parts import TEXTS, equip, targets
from difftune.reports.sheets import SIDE
from guidance.methods.catalogue import APG, CFG, FBG, GUIDANCE, AdaptiveGuidance, CFGpp, Interval, Rescale
from tests.support.pipelines import ddim, sd

STEPS = ["--steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sd(scheduler=ddim()).save_pretrained(folder)
    return str(folder)


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def refuse(*arguments, saying):
    result = call(*arguments)
    assert result.exit_code != 0 and result.stdout == "" and saying in result.stderr, (result.output, result.exception)
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------ names and settings
def test_a_method_inside_a_method():
    method = guidance_named("interval:apg", 4.0, {"low": 0.1, "method.eta": 0.5, "momentum": -0.25})
    assert method == Interval(APG(4.0, eta=0.5, momentum=-0.25), low=0.1)
    assert guidance_named("rescale") == Rescale(CFG(7.5)) and guidance_named("interval:rescale", 3.0) == Interval(
        Rescale(CFG(3.0))
    )
    assert guidance_named("rescale:cfgpp", 0.4, {"phi": 0.2}) == Rescale(CFGpp(0.4), 0.2)
    assert [n for n in GUIDANCE if not takes_scale(n)] == ["none", "dynamic"]


@pytest.mark.parametrize(
    ("name", "options", "saying"),
    [
        ("cfg:apg", {}, "in 'cfg:apg', cfg can hold no other method; these can: interval, rescale"),
        ("interval:agp", {}, "no guidance method 'agp' (did you mean 'ag'?)"),
        ("interval:apg", {"method.low": 1.0}, "no option of guidance 'interval:apg' 'method.low'"),
        ("interval:apg", {"methd.eta": 1.0}, "no option of guidance 'interval:apg' 'methd.eta'"),
        ("interval:apg", {"method": 1.0}, "no option of guidance 'interval:apg' 'method'"),
        ("apg", {"method.eta": 1.0}, "no option of guidance 'apg' 'method.eta'"),
        ("interval:cfgpp", {}, "Interval cannot hold CFGpp"),
    ],
)
def test_names_that_are_refused(name, options, saying):
    with pytest.raises(UserError) as error:
        guidance_named(name, None, options)
    assert saying in str(error.value)


# ------------------------------------------------------------------------------------------------ every method
FLAGS = {
    "perpneg": ["--guidance.negatives", "a blue square; a circle", "--guidance.weights", "1;0.5"],
    "cfg-zero": ["--guidance.zero_steps", "0"],
    "nasa": ["--guidance.negative", "blue"],
    "nag": ["--guidance.negative", "blue"],
    "multi": ["--guidance.conds", "cond;a blue square"],
    "ag": ["--guidance.crossing", "cfg"],
    "dynamic": ["--guidance.candidates", "1;3", "--guidance.scorers", "brightness;contrast"],
    "seg": ["--guidance.sigma", "1"],
    "apg": ["--guidance.radius", "none"],
    "gfcg": ["--guidance.rule", "pair", "--guidance.tolerance", "0"],
}
NFE = {"none": 2, "classifier": 2, "nasa": 2, "nag": 2, "perpneg": 8, "multi": 6, "linear-ag": 3}
NFE |= {"rectified-cfgpp": 6, "cfg-mp": 10}
NFE |= {"ag": None, "interval": None}  # depends on the picture


@pytest.fixture
def parts(monkeypatch):
    """A small classifier and a weak network in place of the embedded ones, which an installation may lack."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, len(TEXTS)))
    monkeypatch.setattr(method_parts, "_loaded_classifier", lambda: net)
    monkeypatch.setattr(method_parts, "_network", lambda model: sd(seed=1).unet)


def test_a_weak_network_keeps_its_weights_where_a_pipeline_is_in_half_precision(monkeypatch):
    weak, half = sd(seed=1).unet, sd().to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in weak.state_dict().items()}
    monkeypatch.setattr(method_parts, "_network", lambda model: weak)
    networks = equip(half, guidance_named("autoguidance", 2.0)).networks
    assert networks["weak"].dtype == torch.bfloat16
    assert all(torch.equal(weight, before[name]) for name, weight in weak.state_dict().items())


def test_a_column_of_cfgs_scale_is_each_methods_own():
    assert at_cfg_scale("fbg", 5.5, None, 4) == FBG(largest=5.5)
    for scale in (0.0, 1.0):  # no scale that follows the picture is as low
        assert at_cfg_scale("interval:fbg", scale, None, 4) == Interval(FBG(scale, prior=1.0))
    assert at_cfg_scale("rectified-cfgpp", 5.5, None, 4).scale == 4.5 and at_cfg_scale("apg", 5.5, None, 4).scale == 5.5


@pytest.mark.parametrize("name", [name for name in GUIDANCE if name != "null-text"])
@pytest.mark.sampled(3)
def test_sample_reaches_every_method(name, model, parts, tmp_path):
    flags = ["--guidance", name, *FLAGS.get(name, []), "--prompt", "a red circle", "--output_dir", tmp_path / "out"]
    found = json.loads(succeed("sample", "--model", model, *flags, "--json", *STEPS).stdout)
    expected = NFE.get(name, 4)
    assert sum(found["nfe_by_branch"].values()) == pytest.approx(found["nfe"])
    assert expected in (None, found["nfe"]) and found["settings"]["guidance"] == name
    assert (tmp_path / "out" / "00000-seed0.png").is_file()


def test_settings_in_their_types(model, tmp_path):
    flags = ["--guidance", "interval:apg", "--guidance.low", "0.5", "--guidance.method.radius", "none", *STEPS]
    base = ["sample", "--model", model, "--prompt", "a red circle", *flags]
    found = json.loads(succeed(*base, "--guidance_scale", 3, "--output_dir", tmp_path / "a", "--json").stdout)
    inner = {"scale": 3.0, "eta": 0.0, "momentum": -0.5, "radius": None}
    assert found["settings"]["guidance_options"] == {"method": inner, "low": 0.5, "high": 5.42}


@pytest.mark.parametrize(
    ("flags", "saying"),
    [
        (["--guidance", "null-text"], "NullTextInversion has no embeddings: make it by"),
        (["--guidance", "perpneg"], "perpneg has no negative prompt: give --guidance.negatives"),
        (["--guidance", "nasa"], "NASA has no negative prompt: give --guidance.negative"),
        (["--guidance", "gfcg", "--guidance.classify", "resnet"], "no classifier 'resnet'"),
        (["--guidance", "gfcg", "--guidance.classes", "x"], "--guidance.classes is an object"),
        (["--guidance", "ag", "--guidance.crossing", "cat"], "--guidance.crossing: 'cat' is not one of"),
        (["--guidance", "dynamic", "--guidance.scorers", "tiny-clp"], "no reward 'tiny-clp' (did you mean 'tiny-clip'"),
        (["--guidance", "cfg-zero"], "for flow models alone; set zero_steps=0"),
        (["--guidance", "autoguidance", "--guidance.network", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_what_is_missing_is_said(flags, saying, model, tmp_path):
    base = ["sample", "--model", model, "--prompt", "a red circle", "--output_dir", tmp_path / "o"]
    refuse(*base, *flags, *STEPS, saying=saying)


def test_targets():
    assert targets(["a red circle", "an orange triangle"]).tolist() == [0, len(TEXTS) - 1]
    with pytest.raises(UserError, match="prompt 'a cat' is not a class of tiny-classifier"):
        targets(["a cat"])


def test_equipping_leaves_what_is_there():
    method = Interval(AdaptiveGuidance())
    found = equip(None, method)
    assert (found.method(["x"]), found.networks) == (method, {})


# ------------------------------------------------------------------------------------------------ compare
def test_compare_writes_a_grid_and_a_table(model, tmp_path):
    flags = ["--guidance", "none", "cfg", "cfgpp", "interval:apg", "--scales", "1", "3", "--num_images", "2"]
    base = ["compare", "--model", model, *flags, "--prompt", "a red circle", "a blue square", "--seed", "7", *STEPS]
    result = succeed(*base, "--reward", "brightness", "--json", "--output_dir", tmp_path / "a")
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "a" / "compare.json").read_text()) == found
    rows = {(r["guidance"], r["cfg_scale"]): r for r in found["rows"]}
    assert list(rows) == [("none", None), *((n, s) for n in ("cfg", "cfgpp", "interval:apg") for s in (1.0, 3.0))]
    assert all({"brightness", "saturation", "contrast", "nfe", "seconds"} <= r.keys() for r in found["rows"])
    assert rows["none", None]["nfe"] == 2 and rows["cfg", 1.0]["nfe"] == 4
    for score in ("brightness", "saturation", "contrast"):  # CFG of scale 1 is no guidance
        assert rows["cfg", 1.0][score] == pytest.approx(rows["none", None][score], abs=1e-3)
    assert rows["cfgpp", 3.0]["options"]["scale"] < 3 and rows["cfg", 3.0]["options"] == {"scale": 3.0}
    width, height = Image.open(tmp_path / "a" / "grid.png").size
    assert width > 2 * (2 * SIDE + 2) and 4 * (2 * SIDE + 2) < height < 5 * (2 * SIDE + 2)
    table = succeed(*base, "--output_dir", tmp_path / "b").stdout.splitlines()
    assert table[0].split() == ["guidance", "scale", "oracle", "saturation", "contrast", "NFE", "seconds"]
    assert len(table) == 8
    refuse(*base, "--output_dir", tmp_path / "a", saying="holds another run")
    refuse(*base, "--guidance", "cgf", "--output_dir", tmp_path / "c", saying="no guidance method 'cgf'")


def test_the_images_of_a_cell_lie_under_its_labels():
    def cell(name: str, scale: float | None, gray: float) -> Cell:
        return Cell(
            name, scale, CFG(), "DDIMScheduler", Pictures(torch.full((1, 3, 8, 8), gray), [1.0], {"cond": 1.0}, 1.0)
        )

    picture = draw_sheet([cell("none", None, 0.2), cell("cfg", 1.0, 0.4), cell("cfg", 2.0, 0.6)], [1.0, 2.0], 1)
    pixels = np.asarray(Image.open(BytesIO(picture)))
    corners = {}
    for gray in (0.2, 0.4, 0.6):
        flat = (pixels == round(255 * gray)).all(2)
        y = np.nonzero(flat.sum(1) >= SIDE)[0].min()
        corners[gray] = y, np.nonzero(flat[y])[0].min()
        y, x = corners[gray]
        assert (pixels[y : y + SIDE, x : x + SIDE] == round(255 * gray)).all()  # enlarged 16 times
        assert (pixels[max(y - 18, 0) : y, x : x + SIDE] < 128).any() and (pixels[y : y + SIDE, :x] < 128).any()
    assert caption(cell("cfg", 2.0, 0.1)) == "scale 7.5 (CFG 2), 1 NFE" and caption(cell("none", None, 0.1)) == "1 NFE"
    largest = replace(cell("fbg", 3.0, 0.1), method=Interval(at_cfg_scale("fbg", 3.0, None, 4)))
    assert caption(largest) == "largest 3, 1 NFE"
    assert caption(replace(largest, scale=1.0, method=at_cfg_scale("fbg", 1.0, None, 4))) == "scale 1, 1 NFE"
    odd = cell("none", None, 0.1)
    odd.made.nfes[0] = 217 / 6
    assert caption(odd) == "36.17 NFE"
    assert corners[0.2][1] == corners[0.4][1] < corners[0.6][1] and corners[0.2][0] < corners[0.4][0] == corners[0.6][0]
