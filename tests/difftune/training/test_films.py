"""Films of Wan in training: made, judged by the mean over their frames, and written by the validations."""

from dataclasses import replace
from functools import wraps

import pytest
import torch
from diffusers import WanPipeline

from difftune.configs.recipes import AlignPropConfig, DPOConfig, DragonConfig, GRPOConfig
from difftune.errors import UserError
from difftune.lookup import over_frames
from difftune.recipes import check_recipe, train, train_in_folder
from rewards.simple import Brightness
from solvers.latent import LatentModel
from tests.support import dits, pipelines

SHORT = {"max_train_steps": 1, "num_inference_steps": 2, "guidance_scale": 2.0, "num_frames": 5, "reward_frames": 3}
ALIGNPROP = AlignPropConfig(train_batch_size=2, truncation_max=2, **SHORT)
GROUPS = {"gradient_accumulation_steps": 1, "num_images_per_prompt": 2, "sde_window": 0}
GRPO = GRPOConfig(train_batch_size=4, **GROUPS, **SHORT)


class Judged(Brightness):
    """Brightness, which writes down how many pictures it is shown at once."""

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts):
        self.seen.append(tuple(images.shape))
        return super().__call__(images, prompts)


@pytest.fixture
def small(monkeypatch):
    """Films of 16 x 16 pixels, where Wan's own size is not asked for."""
    monkeypatch.setattr(LatentModel, "size", lambda self, height=None, width=None: (height or 16, width or 16))
    whole = WanPipeline.__call__

    @wraps(whole)
    def sized(self, *args, **options):
        return whole(self, *args, **{"height": 16, "width": 16, **options})

    monkeypatch.setattr(WanPipeline, "__call__", sized)


def test_a_step_on_films(small, tmp_path):
    (tmp_path / "prompts.txt").write_text("red circle\n")
    judge = Judged()
    config = replace(GRPO, prompts=str(tmp_path / "prompts.txt"))
    ((metrics, state),) = train(config, None, dits.wan(dits.flow(), texts=True), judge)
    assert set(judge.seen) == {(4 * config.reward_frames, 3, 16, 16)} and metrics["grad_norm"] > 0
    assert max(value.abs().max() for name, value in state.tensors.items() if "lora_B" in name) > 0


@pytest.mark.parametrize("config", (GRPO, ALIGNPROP), ids=("grpo", "alignprop"))
@pytest.mark.slow
def test_validations_write_films(small, tmp_path, config):
    pytest.importorskip("cv2")
    (tmp_path / "prompts.txt").write_text("red circle\n")
    prompts, judge = str(tmp_path / "prompts.txt"), Judged()
    checked = {"validation_steps": 1, "validation_prompts": prompts, "num_validation_images": 1}
    config = replace(config, prompts=prompts, output_dir=str(tmp_path / "run"), **checked)
    found = train_in_folder(config, lambda line: None, dits.wan(dits.flow(), texts=True), judge)
    assert set(judge.seen) <= {(n * config.reward_frames, 3, 16, 16) for n in (1, 2, 4)}
    assert found["optimizer_steps"] == 1 and found["validation_last"] != 0
    names = {path.name for path in (tmp_path / "run" / "validation").iterdir()}
    films = {f"step-00000{step}-00.mp4" for step in (0, 1)}
    assert films | {"step-000000.png", "step-000001.png"} <= names
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_films_reward_is_the_mean_over_its_frames():
    film, bright = torch.rand(2, 3, 9, 4, 4), Brightness()
    judge = over_frames(over_frames(bright, GRPO), GRPO)  # the second time, nothing is left to choose
    torch.testing.assert_close(
        judge(film, ["a", "b"]), torch.stack([bright(film[:, :, i], ["a", "b"]) for i in (0, 4, 8)]).mean(0)
    )
    assert over_frames(bright, replace(GRPO, num_frames=1)) is bright


def test_films_are_refused_where_they_cannot_be(small, tmp_path):
    message = "num_frames is 5, and this run learns from pictures or from sets of them"
    for config in (DPOConfig(labels="x", num_frames=5), DragonConfig(objective="frechet", num_frames=5)):
        with pytest.raises(UserError, match=message):
            check_recipe(config)
    with pytest.raises(ValueError, match="StableDiffusionPipeline makes pictures: leave num_frames=5 out"):
        next(train(GRPO, None, pipelines.sd(), Brightness()))
    with pytest.raises(ValueError, match="num_frames is 6: give 1 more than a multiple of 4"):
        next(train(replace(GRPO, num_frames=6), None, dits.wan(dits.flow(), texts=True), Brightness()))
