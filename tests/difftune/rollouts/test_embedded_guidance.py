"""Networks that are told a guidance scale (FLUX.1-dev, LCM): in recipes, in their validation, and in search."""

from functools import partial

import pytest
import torch
from diffusers import LCMScheduler

from difftune.errors import UserError
from difftune.recipes import train, train_in_folder
from difftune.search_runs.search import search
from guidance.methods.cfg import Plain
from rewards.simple import Brightness
from tests.support import dits, pipelines
from tests.support.toys import toy


def lcm():
    table = {key: pipelines.ddim().config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler = LCMScheduler(**table, clip_sample=False, set_alpha_to_one=False)
    return pipelines.sd(scheduler=scheduler, unet_config={"time_cond_proj_dim": 8})


TOLD = {"flux-dev": partial(dits.flux, guidance_embeds=True), "lcm": lcm}
ONE = {"guidance": "none", "train_batch_size": 2, "max_train_steps": 1, "num_inference_steps": 2}


@pytest.mark.parametrize("make", [pytest.param(TOLD["flux-dev"], marks=pytest.mark.slow), TOLD["lcm"]], ids=TOLD)
@pytest.mark.sampled(2)
def test_recipes_tell_the_network_its_scale_and_ask_for_one(make, tmp_path):
    found = []
    for told in (2.0, 5.0):
        config = toy("alignprop", tmp_path, **ONE, embedded_guidance=told)
        ((metrics, _),) = train(config, None, make(), Brightness())
        assert metrics["grad_norm"] > 0
        found.append(metrics["reward_mean"])
    assert found[0] != found[1]
    with pytest.raises(UserError, match="pass embedded_guidance"):
        next(train(toy("ddpo", tmp_path, **ONE), None, make(), Brightness()))


def test_a_network_that_is_told_nothing_refuses_a_scale(tmp_path):
    with pytest.raises(UserError, match="do not pass embedded_guidance"):
        next(train(toy("dpo", tmp_path, **ONE, embedded_guidance=3.5), None, pipelines.sd(), Brightness()))


def test_validations_are_told_the_scale(tmp_path):
    """The validation before any change differs by the scale alone."""
    means = []
    for told in (2.0, 5.0):
        out = tmp_path / f"{told}"
        some = {"validation_steps": 1, "num_validation_images": 2, "learning_rate": 1e-12, "output_dir": str(out)}
        config = toy("alignprop", tmp_path, **{**ONE, **some}, embedded_guidance=told)
        train_in_folder(config, [].append, lcm(), Brightness())
        means.append((out / "validation.jsonl").read_text())
    assert means[0] != means[1]


@pytest.mark.parametrize("make", TOLD.values(), ids=TOLD)
def test_search_tells_the_network_its_scale(make):
    pipe, settings = make(), {"method": "best-of-n", "reward": Brightness(), "nfe_budget": 4, "num_inference_steps": 2}
    settings |= {"guidance": Plain(), "progress": False}
    ends = [search(pipe, ["red"], embedded_guidance=told, **settings).run().latents for told in (2.0, 5.0)]
    assert not torch.equal(*ends)
    with pytest.raises(UserError, match="pass embedded_guidance"):
        search(pipe, ["red"], **settings)
