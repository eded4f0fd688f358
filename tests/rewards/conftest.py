import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from rewards import hub
from rewards.network.remote import Server
from rewards.registry import Reward, load
from tests.support import checkpoints, judge_server, pipelines

MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)
QUESTIONED = ["a red circle", "a blue square", "a red square", ""]  # prompts of the tests


@pytest.fixture(scope="session")
def random_clip(tmp_path_factory) -> Path:
    """A tiny random open_clip model in a folder of open_clip's own format, with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = pipelines.tokenizer()
    tokenizer.save_pretrained(folder)
    tower = {"width": 16, "layers": 1}
    text = {"context_length": 8, "vocab_size": len(tokenizer), "heads": 2, "pool_type": "eos"}
    text |= {"hf_tokenizer_name": ".", "eos_id": tokenizer.eos_token_id}
    vision = {"image_size": 16, "patch_size": 8, "head_width": 8}
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": tower | vision, "text_cfg": tower | text},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.half() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


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
