import json
import multiprocessing
import os
import resource
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from difftune import models
from difftune.errors import DiskError, UserError
from tests.support import pipelines


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An installation whose embedded models are tiny random ones, and its cache."""
    monkeypatch.setattr(models, "ROOT", tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "site" / "difftune" / "weights"
    tiny = pipelines.sd()
    tiny.save_pretrained(weights / "tiny")
    with torch.no_grad():
        tiny.unet.conv_in.weight.mul_(2)
    tiny.unet.save_pretrained(weights / "tiny-turbo" / "unet")
    LCMScheduler().save_pretrained(weights / "tiny-turbo" / "scheduler")
    tiny.unet.save_pretrained(weights / "tiny-weak" / "unet")
    return tmp_path


def test_embedded_model_is_its_folder(root):
    assert models.path("tiny") == root / "site/difftune/weights/tiny"


def test_reading_a_folder_shows_no_bars_unless_they_are_asked_for(root, capfd):
    models.load("tiny")
    assert "Loading" not in capfd.readouterr().err
    token = models.show_bars.set(True)
    models.load("tiny")
    models.show_bars.reset(token)
    assert "Loading pipeline components" in capfd.readouterr().err  # and the libraries' own switches are as they were


def test_sibling_is_put_together_from_its_own_parts_and_the_base(root):
    plain = models.load("tiny")
    turbo = StableDiffusionPipeline.from_pretrained(models.path("tiny-turbo"))
    assert isinstance(turbo.scheduler, LCMScheduler)
    assert torch.equal(turbo.unet.conv_in.weight, 2 * plain.unet.conv_in.weight)
    assert torch.equal(turbo.vae.quant_conv.weight, plain.vae.quant_conv.weight)
    weak = models.load("tiny-weak")
    assert isinstance(weak.scheduler, DDIMScheduler)
    assert torch.equal(weak.unet.conv_in.weight, turbo.unet.conv_in.weight)
    assert weak.unet.dtype == torch.float32
    assert models.load("tiny-weak", torch_dtype=torch.float16).unet.dtype == torch.float16


def test_sibling_is_put_together_once_and_again_when_its_parts_change(root):
    first = models.path("tiny-weak")
    marker = first / "marker"
    marker.touch()
    assert models.path("tiny-weak") == first and marker.exists()
    config = root / "site/difftune/weights/tiny/vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    second = models.path("tiny-weak")
    assert second != first
    assert json.loads((second / "vae/config.json").read_text())["scaling_factor"] == 0.5


def _path(site: Path, name: str) -> Path:
    models.ROOT = site
    return models.path(name)


def test_processes_that_put_it_together_at_once_agree(root):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(_path, [(root / "site", "tiny-turbo")] * 8)
    assert len(set(found)) == 1
    assert [f.name for f in (root / "cache/difftune").iterdir()] == [found[0].name]  # and nothing half-made stays


def test_a_loser_of_the_race_takes_the_winners_folder(root, monkeypatch):
    done = models.path("tiny-weak")
    merge = models._merge

    def overtaken(base, own, target):
        merge(base, own, target)
        done.mkdir()
        (done / "winner").touch()

    for file in sorted(done.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    done.rmdir()
    monkeypatch.setattr(models, "_merge", overtaken)
    assert (models.path("tiny-weak") / "winner").exists()
    assert list((root / "cache/difftune").iterdir()) == [done]


def test_cache_that_cannot_be_written_names_the_remedy(root, monkeypatch):
    (root / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "file"))
    with pytest.raises(OSError, match=r"cannot write to .*: set XDG_CACHE_HOME"):
        models.path("tiny-turbo")


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(root):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError, match=r"cannot write to .*File too large.*: set XDG_CACHE_HOME") as error:
            models.path("tiny-turbo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and list((root / "cache/difftune").iterdir()) == []


def test_others_may_read_what_the_umask_lets_them(root):
    before = os.umask(0o022)
    try:
        found = models.path("tiny-turbo")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (found, *found.rglob("*"))} <= {0o755, 0o644}


def test_folder_of_ones_own(root):
    assert models.source(root / "site/difftune/weights/tiny") == root / "site/difftune/weights/tiny"
    assert models.load(str(root / "site/difftune/weights/tiny")).unet.config.in_channels == 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tiny-turb", r"no model 'tiny-turb' \(did you mean 'tiny-turbo'\?\); known: tiny, .*owner/name on the Hub"),
        ("tiny-clip", r"'tiny-clip' is an open_clip model.*, not a pipeline; embedded pipelines: tiny, "),
        ("./nowhere", r"no model './nowhere'"),
        ("/", r"'/' is not a pipeline: it holds no model_index.json"),
        ("nobody/no-model", r"cannot load 'nobody/no-model' from the Hub: .+; embedded: tiny"),
    ],
)
def test_what_is_no_model_gets_one_sentence(root, name, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        models.load(name)
    assert "\n" not in str(caught.value)


def test_unknown_embedded_name_and_missing_weights(root):
    with pytest.raises(ValueError, match="no embedded model 'small'"):
        models.path("small")
    with pytest.raises(OSError, match=r"'tiny-clip' is not in this installation \(.*\): reinstall difftune"):
        models.path("tiny-clip")


def test_text_encoder_loads_under_transformers_4_too():
    """It reads vocab.json and merges.txt, and gives weights random values, in silence, whose names it does not know."""
    tiny = Path(models.path("tiny"))
    names = load_file(tiny / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    known = json.loads((tiny / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((tiny / "tokenizer" / "vocab.json").read_text()) == known["vocab"]
    _, *merges = (tiny / "tokenizer" / "merges.txt").read_text().splitlines()
    assert [tuple(merge.split()) for merge in merges] == [tuple(merge) for merge in known["merges"]]


OLD = ("transformers==4.57.6", "tokenizers==0.22.*", "huggingface_hub<1.0")
ENCODES = """
import json, sys, torch, transformers
from transformers import CLIPTextModel, CLIPTokenizer
folder, prompts = sys.argv[1], sys.argv[2:]
tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
with torch.no_grad():
    states = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")(ids)[0]
print(json.dumps([transformers.__version__, ids.tolist(), states.tolist()]))
"""


@pytest.mark.slow
def test_transformers_4_itself_reads_the_text_encoder(tmp_path):
    """In an environment with that release from the registry, and all else of this one."""
    python, prompts = tmp_path / "bin/python", ["a red circle", "two green triangles on a black background"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, *OLD], check=True)
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    command = ["-c", ENCODES, models.path("tiny"), *prompts]
    said = [
        subprocess.run([of, *command], capture_output=True, text=True, check=True) for of in (python, sys.executable)
    ]
    (old, ids, states), (_, own_ids, own_states) = (json.loads(each.stdout.splitlines()[-1]) for each in said)
    assert old == "4.57.6" and ids == own_ids
    torch.testing.assert_close(torch.tensor(states), torch.tensor(own_states), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_pickled_weights_alone_are_refused_in_every_part(root, part):
    folder = root / "site/difftune/weights/tiny"
    (file,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    models.load(folder)  # beside safetensors they are not looked at
    file.unlink()
    with pytest.raises(UserError, match=rf"{part} holds pickled weights alone .*safe_serialization=True"):
        models.load(folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_of_8_bits_are_refused_in_every_part(root, part):
    folder = root / "site/difftune/weights/tiny"
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{part} is quantised \({name} is of 8 bits\): give a model in float16"):
        models.load(folder)


@pytest.mark.parametrize("how", ["gone", "renamed"])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_part_that_lacks_a_weight_is_refused(root, part, how):
    """It would be random. That a file has another tensor in its place, or a prefix to all names, changes nothing."""
    folder = root / "site/difftune/weights/tiny"
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
    weight = tensors.pop(name)
    save_file(tensors | ({"a.b.c.weight": weight} if how == "renamed" else {}), file, {"format": "pt"})
    with pytest.raises(UserError, match="random|missing|Missing"):
        models.load(folder)


def test_without_a_home_the_remedy_is_named(root, monkeypatch):
    """No HOME, no entry among the system's users, no XDG_CACHE_HOME; what needs no cache works."""
    import pwd

    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(DiskError, match="there is no home folder: set XDG_CACHE_HOME to a folder that can be written"):
        models.path("tiny-turbo")
    with pytest.raises(UserError, match="no model '~nobody/x'"):
        models.source("~nobody/x")
    assert models.path("tiny").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    assert models.path("tiny-turbo").is_dir()


WRONG_VALUES = [
    ("unet", {"sample_size": 0}, "has sample_size=0"),
    ("vae", {"scaling_factor": "x"}, "has scaling_factor=x"),
    ("vae", {"scaling_factor": 0}, "has scaling_factor=0"),
    ("vae", {"shift_factor": "x"}, "has shift_factor=x"),
    ("tokenizer", None, "lacks model_max_length"),
]


@pytest.mark.parametrize(("part", "values", "sentence"), WRONG_VALUES)
def test_values_that_nothing_can_be_drawn_with_are_refused(root, part, values, sentence):
    folder = root / "site/difftune/weights/tiny" / part
    if values is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UserError, match=f"{part} {sentence}"):
        models.load(folder.parent)
