"""ReNO on every family that `LatentModel` knows: a gradient of noise and embedding, and a noise for the pipeline."""

import pytest
import torch

from difftune.generate import for_pipeline
from difftune.reno import ReNO
from tests import dits, pipelines

PROMPTS = ["red circle", "blue square"]
PIPELINES = {"sdxl": pipelines.sdxl, "sd3": dits.sd3, "flux": dits.flux, "pixart": dits.pixart, "sana": dits.sana}


class Left:
    """The picture's left half minus its right."""

    differentiable = True

    def __call__(self, images, prompts):
        left, right = images.chunk(2, dim=3)
        return left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", PIPELINES)
def test_noise_and_embedding_are_optimised(name):
    pipe = PIPELINES[name]()
    settings = ReNO(pipe, Left(), 2, optimizer="adam[learning_rate=0.1]", variables="both", height=16, width=16,
                    regularization=0.0, progress=False)  # fmt: skip
    result = settings.optimize(PROMPTS, 4)
    assert (result.rewards > result.rewards_before).all() and result.history[0].grad_norm.min() > 0
    assert not torch.equal(result.noises, result.noises_before)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_the_pipeline_makes_the_picture_from_the_noise_at_its_size(name):
    pipe = PIPELINES[name]()
    result = ReNO(pipe, Left(), 2, height=16, width=24, progress=False).optimize(PROMPTS, 2)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    made = pipe(PROMPTS, **for_pipeline(pipe, result.noises), **call).images
    assert made.shape == (2, 3, 16, 24) and torch.allclose(made.float(), result.images.float(), atol=1e-3)
