"""Several rewards of one scale, in training and in search: what a run is then, that it resumes, and what is refused."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from difftune.configs.search import SearchConfig
from difftune.files import checkpoint
from difftune.recipes import RECIPES, check_recipe, train
from difftune.recipes.scaling import scale_rewards
from difftune.search_runs.run_folder import search_in_folder
from rewards.compose import WeightedSum, weighted
from rewards.registry import REWARDS, load
from rewards.simple import Saturation
from tests.support import pipelines
from tests.support.toys import session_of, toy


class Hundred(Saturation):
    """Saturation in percent."""

    def __call__(self, images, prompts):
        return 100 * super().__call__(images, prompts) + 7


PLAIN = WeightedSum({"brightness": load("brightness"), "b": Saturation()}, {"brightness": 1.0, "b": 1.0})
LARGE = replace(PLAIN, rewards={"brightness": load("brightness"), "b": Hundred()})


def moments(config, reward):
    """What the optimiser has seen after its second step."""
    _, (_, state) = islice(train(config, None, pipelines.sd(), reward), 2)
    return torch.cat([state.tensors[k].flatten() for k in sorted(state.tensors) if k.startswith("optimizer.exp_avg.")])


def test_the_unit_of_a_reward_does_not_count_within_a_group(tmp_path):
    config = toy("ddpo", tmp_path, reward_scaling="group", max_train_steps=2, train_batch_size=4,
                 num_images_per_prompt=4, per_prompt_stat_tracking=False)  # fmt: skip
    assert torch.allclose(moments(config, PLAIN), moments(config, LARGE), rtol=1e-3, atol=1e-7)
    plain = replace(config, reward_scaling="none")
    assert not torch.allclose(moments(plain, PLAIN), moments(plain, LARGE), rtol=1e-3, atol=1e-7)


def test_the_scale_of_a_step_is_that_of_the_steps_before(tmp_path):
    """The second step's mean reward by hand, of the scores that both steps reported of each reward."""
    config = toy("alignprop", tmp_path, reward_scaling="running", max_train_steps=2, gradient="checkpoint")
    steps = [metrics for metrics, _ in train(config, None, pipelines.sd(), weighted({"brightness": 2, "contrast": 1}))]
    session = session_of(config, pipelines.sd(), weighted({"brightness": 2, "contrast": 1}))
    judge = scale_rewards(RECIPES["alignprop"], session).reward
    low, high = REWARDS["contrast"].range
    first = 2 * (steps[0]["reward.brightness"] + 1) + (steps[0]["reward.contrast"] - low) / (high - low)
    assert steps[0]["reward_mean"] == pytest.approx(first, abs=1e-5)
    images, prompts = session.images(session.prompts, range(2), "full")
    judge.scales.listen()
    judge(images, prompts)
    judge.scales.count(judge.scales.take())
    judge.scales.renew()
    second = sum(w * (steps[1][f"reward.{n}"] - judge.scale(n).mean) / judge.scale(n).std
                 for n, w in judge.weights.items())  # fmt: skip
    assert steps[1]["reward_mean"] == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("name", ["kto", pytest.param("alignprop", marks=pytest.mark.slow)])
def test_a_run_with_running_scales_resumes_bit_for_bit(name, tmp_path):
    """A round is under way at the checkpoint."""
    more = {"updates_per_round": 3} if name == "kto" else {}
    config = toy(name, tmp_path, reward_scaling="running", max_train_steps=4, **more)
    states = [state for _, state in train(config, None, pipelines.sd(), LARGE)]
    path = checkpoint.save(tmp_path / "out", states[1])
    *_, (_, resumed) = train(config, checkpoint.load(path), pipelines.sd(), LARGE)
    whole = states[-1]
    assert all(torch.equal(whole.tensors[key], resumed.tensors[key]) for key in whole.tensors)
    found, expected = (json.loads(json.dumps(state.info)) for state in (resumed, whole))
    assert found["metrics"].pop("seconds") and expected["metrics"].pop("seconds")
    assert found == expected and set(found["scales"]) == {"brightness", "b"}


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("alignprop", {"reward_scaling": "group"}, "this alignprop run does not: give 'range' or 'running'"),
        ("ddpo", {"reward_scaling": "group"}, "give --num_images_per_prompt 2 or more"),
        ("dragon", {"reward_scaling": "running"}, "give 'range'"),
        ("dragon", {"reward_scaling": "group"}, "this dragon run does not"),
        ("grpo", {"reward_scaling": "range", "reward": ["remote[url=http://a]"]}, "no nominal range to be scaled by"),
        ("dragon", {"reward_scaling": "range", "objective": "vendi", "encoder": "tiny-clip"}, "this run has no reward"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused(name, more, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        check_recipe(toy(name, tmp_path, **more), pipelines.sd())


def test_a_search_raises_shares_of_ranges(tmp_path):
    config = SearchConfig("best-of-n", ["red circle"], reward=["brightness=2", "contrast"], nfe_budget=12,
                          num_inference_steps=3, reward_scaling="range", output_dir=str(tmp_path / "out"))  # fmt: skip
    found = search_in_folder(config, [].append, pipelines.sd())
    plain = search_in_folder(replace(config, reward_scaling="none", output_dir=str(tmp_path / "plain")), [].append,
                             pipelines.sd())  # fmt: skip
    assert found["settings"]["reward_scaling"] == "range" and found["reward"] > 0 > plain["reward"]
