import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch

from rewards import hub
from rewards.network.remote import Server
from rewards.registry import Reward, load
from tests.support import checkpoints, judge_server

QUESTIONED = ["a red circle", "a blue square", "a red square", ""]  # prompts of the tests


@pytest.fixture(scope="session")
def random_clip(tmp_path_factory) -> Path:
    """A tiny random open_clip model in a folder of open_clip's own format, with a vocabulary of its own."""
    return checkpoints.open_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def made(tmp_path_factory, random_clip) -> dict[str, dict]:
    """What `load` needs beyond the name to make a reward of a small random checkpoint of the published layout."""
    folder = tmp_path_factory.mktemp("made")
    clip = {"weights": checkpoints.clip_file(folder), "sizes": checkpoints.CLIP_SIZES}
    hps = clip | {"weights": checkpoints.hps_file(folder)}
    aesthetic = clip | {"predictor": checkpoints.aesthetic_file(folder)}
    weights, vocabulary = checkpoints.image_reward(folder)
    judge, questions = {"model": checkpoints.llava(tmp_path_factory.mktemp("llava"))}, folder / "questions.jsonl"
    asked = [["Is there a circle?", "Yes"], ["How many squares are there?", "two"]]
    lines = [json.dumps({"prompt": prompt, "vqa_list": asked}) for prompt in QUESTIONED]
    questions.write_text("\n".join(lines))
    cycle, _ = checkpoints.image_reward(tmp_path_factory.mktemp("cycle"), (0, 2, 4, 6, 8))
    blip = {"vision": checkpoints.BLIP_VISION, "text": checkpoints.BLIP_TEXT}
    return {
        "tiny-clip": {"folder": random_clip},
        "clip-score": clip,
        "pickscore": clip,
        "hps-v2": hps,
        "hps-v2.1": hps,
        "aesthetic": aesthetic,
        "aesthetic-ava": aesthetic,
        "aesthetic-v1": aesthetic,
        "hps-v3": dict(zip(("weights", "base"), checkpoints.hpsv3(tmp_path_factory.mktemp("hpsv3")), strict=True)),
        "imagereward": {"weights": weights, "vocabulary": vocabulary, **blip},
        "cyclereward": {"weights": cycle, "vocabulary": vocabulary, **blip},
        "classifier": {"model": checkpoints.timm_classifier(tmp_path_factory.mktemp("timm"))},
        "open-clip": {},
        "text-exemplar": {"texts": ["a red circle", "a blue square"], "options": {"folder": random_clip}},
        "smooth": {"reward": "colorfulness", "pixels": 1, "noise": 0.02, "flips": True},
        "vlm": judge,
        "vqascore": judge,
        "soft-tifa": judge | {"questions": questions},
        "vqascore-clip-flant5": checkpoints.clip_t5(tmp_path_factory.mktemp("clip_t5")),
        "lpips": {"weights": checkpoints.alexnet_file(folder), "reference": torch.full((3, 16, 16), 0.5)},
        "pyiqa": {"metric": "tv"},
        "torchmetrics": {"metric": "total_variation"},
    }


@pytest.fixture(scope="session")
def server():
    """A server of brightness on this machine."""
    with Server(load("brightness")) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def judge_url():
    """A server process of OpenAI's protocol."""
    with judge_server.judging() as (url, _):
        yield url


@pytest.fixture
def options(made, server, judge_url, random_clip, monkeypatch) -> dict[str, dict]:
    """`made`, a Hub that has one model of open_clip, and two servers."""
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda model, **_: str(random_clip))
    return made | {"remote": {"url": server.url}, "judge": {"url": judge_url, "model": "bright"}}


LOADED: dict[str, Reward] = {}


@pytest.fixture
def loaded(options) -> Callable[[str], Reward]:
    """Every reward of the registry by its name, made once: they have no state."""

    def get(name: str) -> Reward:
        if name not in LOADED:
            LOADED[name] = load(name, **options.get(name, {}))
        return LOADED[name]

    return get
