"""`difftune eval` on the embedded model, with and without a LoRA."""

import json
from collections import defaultdict

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from difftune.models import path
from tests.difftune.cli.test_cli import succeed

PROMPTS = ["a red circle", "a blue square", "two green triangles"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A small random LoRA of the embedded model, whose run says that it was trained on tiny-clip."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = StableDiffusionPipeline.from_pretrained(path("tiny"), safety_checker=None)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    (folder / "config.yaml").write_text(yaml.safe_dump({"reward": ["tiny-clip"], "model": "tiny", "lora": None}))
    return folder


def by_prompt(run, reward):
    """The mean score of each prompt's two images."""
    found = defaultdict(list)
    for image in run["images"]:
        found[image["prompt"]].append(image["scores"][reward] / 2)
    assert all(len(scores) == 2 for scores in found.values())
    return {prompt: sum(scores) for prompt, scores in found.items()}


@pytest.mark.slow
def test_a_lora_is_compared_with_its_model_by_two_rewards(lora, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    ask = ["eval", "--model", "tiny", "--prompts", str(tmp_path / "prompts.txt"), "--reward", "tiny-clip", "jpeg"]
    ask += ["--images_per_prompt", "2", "--num_inference_steps", "2", "--json"]
    base, after = tmp_path / "base", tmp_path / "after"
    first = json.loads(succeed(*ask, "--output_dir", str(base)).stdout)
    (tmp_path / "base.json").write_text(json.dumps(first))
    tuned = ["--lora", str(lora), "--baseline", str(tmp_path / "base.json"), "--output_dir", str(after)]
    found = json.loads(succeed(*ask, *tuned).stdout)

    assert found["paired_by"] == "prompt and seed" and found["comparisons"] == 2
    assert {name: facts["trained_on"] for name, facts in found["rewards"].items()} == {"tiny-clip": True, "jpeg": False}
    for name, facts in found["rewards"].items():
        now, then = (by_prompt(run, name) for run in (found, first))
        assert now.keys() == then.keys() == set(PROMPTS)
        changes = [now[prompt] - then[prompt] for prompt in PROMPTS]
        assert facts["difference"]["score"] == pytest.approx(sum(changes) / 3) and any(changes)
        assert facts["win_rate"]["rate"] == pytest.approx(sum((c > 0) + (c == 0) / 2 for c in changes) / 3)
        assert facts["difference"]["p_holm"] >= facts["difference"]["p"]
    page = (after / "report.html").read_text()
    assert page.count('alt="baseline"') == page.count('alt="this run"') == 3 and ">trained on<" in page
    assert all(prompt in page for prompt in PROMPTS)
    assert "difference" not in first["rewards"]["jpeg"] and first["trained_on"] == []
