import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests import pipelines

MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)


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
