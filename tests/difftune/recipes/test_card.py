"""The model card says what was trained, and its code loads that, for every family and for LoRA and full weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from difftune.configs.recipes import DragonConfig, KTOConfig, PSOConfig
from difftune.pipelines import lora
from difftune.recipes import train_in_folder
from difftune.recipes.card import trained_on
from rewards.simple import Brightness
from tests.support import dits, pipelines
from tests.support.toys import toy

MAKES = {"sd": pipelines.sd, "sdxl": pipelines.sdxl, "sd3": dits.sd3, "flux": dits.flux}
MAKES |= {"pixart": dits.pixart, "sana": dits.sana}
QUICK = {("sd", False), ("sd", True), ("pixart", False)}
CASES = [
    pytest.param(name, full, marks=() if (name, full) in QUICK else pytest.mark.slow)
    for name in MAKES
    for full in (False, True)
]


def trained_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By names that are the same after loading."""
    return {name.replace(".default", "").replace("_0.", "."): w.float() for name, w in network.state_dict().items()}


@pytest.mark.parametrize(("name", "full"), CASES)
def test_the_code_of_a_card_loads_what_was_trained(name, full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = MAKES[name]()
    pipe.save_pretrained("base")
    more: dict[str, Any] = {"guidance": "none", "full_finetuning": full, "max_train_steps": 2, "max_skipped_steps": 2}
    config = toy("alignprop", tmp_path, model="base", output_dir="out", learning_rate=1e-2, **more)
    train_in_folder(config, [].append, pipe, Brightness())
    card = Path("out/README.md").read_text()
    assert ("Full weights of base" in card, "every weight of the denoiser" in card) == (full, full)
    assert ("rank 2" in card, "LoRA of base" in card) == (not full, not full)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    if name != "sd":  # the pictures of these are made at the size of the real models
        code = re.split(r"image = |from difftune import attach", code)[0]
    found: dict[str, Any] = {}
    exec(code, found)
    mine, theirs = (trained_weights(lora.network_of(p)) for p in (pipe, found["pipe"]))
    assert mine.keys() == theirs.keys() and len(mine) > 10
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    if not full:
        assert any("lora_B" in key and value.any() for key, value in theirs.items())
    if name == "sd":
        assert found["image"].size == (16, 16)


def test_what_judged_is_named():
    assert trained_on(KTOConfig(labels="x.jsonl")) == "a person's labels"
    assert trained_on(PSOConfig(images="monet")) == "the pictures of monet"
    assert trained_on(DragonConfig(objective="vendi")) == "the objective vendi"
    assert trained_on(DragonConfig(reward=["jpeg", "brightness=2"])) == "jpeg, brightness=2"
