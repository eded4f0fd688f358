"""`difftune rewards`, and rewards that the registry does not know."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from rewards.registry import REWARDS
from tests.difftune.cli.test_cli import refuse, succeed


def test_list_has_every_reward_with_what_it_asks_for():
    found = json.loads(succeed("rewards", "list", "--json").stdout)
    assert [reward["name"] for reward in found] == sorted(REWARDS)
    hps = next(reward for reward in found if reward["name"] == "hps-v2.1")
    assert hps["differentiable"] and hps["needs_prompt"] and not hps["comparable_across_prompts"]
    told = " ".join(succeed("rewards", "list").stdout.split())
    extras = [reward.extra for reward in REWARDS.values() if reward.extra]
    assert "tiny-clip" in told and {"ocr", "pyiqa", "torchmetrics"} <= set(extras)
    assert all(f"needs the extra difftune[{extra}]" in told for extra in extras)
    assert "-5 to 15; higher is better; reads the prompt; a gradient; licence: Apache-2.0; weights: 33200 MB" in told
    assert {r["name"] for r in found if r["memory_mb"] is None} == {
        "classifier", "vlm", "vqascore", "soft-tifa", "pyiqa", "torchmetrics", "text-exemplar", "smooth"
    }  # fmt: skip
    assert told.count("weights: those of what you name") == 8


def test_info_tells_the_files_and_how_far_they_are_known():
    found = json.loads(succeed("rewards", "info", "imagereward", "--json").stdout)
    assert {file["file"] for file in found["files"]} == {"ImageReward.pt", "vocab.txt"}
    assert {file["evidence"] for file in found["files"]} == {"none", "reported"}
    text = succeed("rewards", "info", "imagereward").stdout
    assert "hub_id: zai-org/ImageReward" in text and re.search(r"revision: \w{40}", text)
    assert "memory_mb: 1790 MB in float32\n" in text and "sha256: none" in text and "not installed" not in text
    refuse(2, "rewards", "info", "hps", saying=["no reward 'hps'", "did you mean 'hps-v3'?"])


def test_prefetch_without_a_network_says_what_is_missing():
    refuse(1, "rewards", "prefetch", "aesthetic", saying=["not in the cache and HF_HUB_OFFLINE is set"])
    refuse(2, "rewards", "prefetch", "tiny-clip", "aesthetics", saying=["did you mean 'aesthetic'?"])
    assert succeed("rewards", "prefetch", "tiny-clip").stdout == "nothing to download\n"
    refuse(1, "rewards", "prefetch", "clip", saying=["laion/CLIP-ViT-H-14-laion2B-s32B-b79K is not in the cache"])
    refuse(2, "rewards", "prefetch", "vlm", saying=["needs the option 'model'"])
    refuse(1, "rewards", "prefetch", "vlm", "--model", "some/vlm", saying=["some/vlm is not in the cache"])


def test_function_of_the_working_directory_scores_pictures(picture, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = succeed("score", "--json", "--reward", "my_rewards:red=2", "--prompt", "a", "--", picture).stdout
    assert json.loads(found)[0]["total"] == pytest.approx(0.4)
    refuse(2, "score", "--reward", "my_rewards:blue", "--", picture, saying=["has no 'blue'"])


def deaf():
    """As a shell starts what it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.slow
def test_served_reward_scores_pictures_by_its_url(picture):
    """Another process serves it until it is interrupted."""
    command = [sys.executable, "-m", "difftune", "rewards", "serve", "brightness", "--port", "0", "--json"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=deaf
    ) as server:
        try:
            url = json.loads(server.stdout.readline())["url"]
            found = succeed("score", "--json", "--reward", url, "--prompt", "a", "--", picture).stdout
            assert json.loads(found)[0]["total"] == pytest.approx(-0.8)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                code = server.wait(120)
            finally:
                server.kill()
        assert code == 130
    refuse(
        1, "score", "--reward", url, "--prompt", "a", "--", picture, saying=["no scores from the reward server", url]
    )


def test_server_for_others_needs_a_token():
    refuse(2, "rewards", "serve", "brightness", "--host", "0.0.0.0", "--port", "0", saying=["give a token"])


def test_extra_that_is_missing_is_one_sentence(picture, monkeypatch):
    monkeypatch.setattr("rewards.learned.ocr.util.find_spec", lambda name: None)
    arguments = ["score", "--reward", "ocr", "--prompt", 'a "b"', "--", picture]
    refuse(1, *arguments, saying=["pip install 'difftune[ocr]'"])
