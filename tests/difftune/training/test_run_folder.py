"""Where a run begins that is resumed."""

from dataclasses import asdict, replace

import pytest
import torch

from difftune.configs.recipes import AlignPropConfig
from difftune.errors import RunError
from difftune.files import checkpoint
from difftune.files.checkpoint import State
from difftune.training.run_folder import starting_state


@pytest.fixture
def config(tmp_path):
    """The config of a run that has three checkpoints, the newest of them damaged."""
    config = AlignPropConfig(output_dir=str(tmp_path))
    about = {"config": asdict(config), "num_processes": 1, "metrics": {}, "model_digest": None}
    for step in (1, 2, 3):
        last = checkpoint.save(tmp_path, State(step, {"weights.a": torch.ones(1)}, about))
    (last / checkpoint.TENSORS).write_bytes(b"")
    return config


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("named", "step"), [("latest", 2), ("checkpoint-1", 1)])
def test_damaged_ones_are_set_aside_whichever_is_named(config, tmp_path, named, step):
    wanted = named if named == "latest" else str(tmp_path / named)
    said = []
    assert starting_state(replace(config, resume_from_checkpoint=wanted), said.append).step == step
    assert said[0].startswith(f"{tmp_path}/checkpoint-3 was set aside as") and len(said) == 2
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3.damaged"]


def test_a_damaged_one_that_is_named_is_an_error_and_stays(config, tmp_path):
    with pytest.raises(RunError, match=r"checkpoint-3 cannot be resumed from: state.safetensors is damaged"):
        starting_state(replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-3")))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
