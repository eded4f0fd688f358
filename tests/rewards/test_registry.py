"""Rewards from elsewhere: entry points of other distributions, and module:attribute."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from rewards import registry
from rewards.compose import parse_rewards, weighted
from rewards.outside import described, plain
from rewards.registry import REWARDS, entry, load, plugins

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
MODULE = '''
"""A module of a user."""
import functools
import torch
from rewards.registry import register

def red(images, prompts):
    """Mean of the red channel."""
    return images[:, 0].mean(dim=(1, 2))

def rounded(images, prompts):
    return red(images.detach(), prompts).round(decimals=1)

def broken(images, prompts):
    return images.mean()

def listed(images, prompts):
    return [0.5 for _ in images]

def of_pil(images, prompts):
    return torch.tensor([image.convert("L").getextrema()[1] for image in images])

def of_images_alone(images):
    return images[:, 0].mean(dim=(1, 2))

class Blue:
    differentiable = True
    def __init__(self, scale: float = 1.0):
        self.scale = scale
    def __call__(self, images, prompts):
        return self.scale * images[:, 2].mean(dim=(1, 2))

blue = Blue(2.0)
part = functools.partial(red)
number = 3

class Silent:
    def __call__(self, images, prompts):
        return red(images, prompts)

silent = Silent()

@register("of-a-plugin", "blue", needs_prompt=False, differentiable=True, range=(0, 1))
class Registered(Blue): ...
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `mine` in the working directory, which a console script does not look into."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "REWARDS", dict(REWARDS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    plugins.cache_clear()
    yield
    sys.modules.pop("mine", None)
    described.cache_clear()
    plugins.cache_clear()


def red() -> torch.Tensor:
    return IMAGES[:, 0].mean(dim=(1, 2))


def test_function_of_the_working_directory_is_a_reward(module):
    found = entry("mine:red")
    assert found.differentiable and found.summary == "Mean of the red channel."
    assert torch.equal(load("mine:red")(IMAGES, PROMPTS), red())


def test_function_without_a_gradient_says_so_by_itself(module):
    assert not entry("mine:rounded").differentiable
    assert not load("mine:rounded").differentiable


def test_class_and_object_are_rewards_too(module):
    blue = IMAGES[:, 2].mean(dim=(1, 2))
    assert torch.equal(load("mine:Blue", scale=3.0)(IMAGES, PROMPTS), 3 * blue)
    assert torch.equal(load("mine:blue")(IMAGES, PROMPTS), 2 * blue)


@pytest.mark.parametrize("name", ["mine:part", "mine:silent"])
def test_any_callable_is_tried(module, name):
    assert entry(name).differentiable and load(name).differentiable
    assert torch.equal(load(name)(IMAGES, PROMPTS), red())


def test_function_is_weighted_on_the_command_line(module):
    weights = parse_rewards(["mine:red=2", "brightness"])
    assert weights == {"mine:red": 2.0, "brightness": 1.0}
    torch.testing.assert_close(weighted({"mine:red": 2.0})(IMAGES, PROMPTS), 2 * red())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "no_such_module:red",
            "cannot import the reward 'no_such_module:red': .*; no_such_module.py belongs in this folder, ",
        ),
        ("mine:green", "the module 'mine' has no 'green'"),
        ("mine:number", "'mine:number' is not a reward: it cannot be called with images and prompts"),
        (
            "mine:Silent",
            "the class 'mine:Silent' is not a reward: write `differentiable = True`, or False, in its body",
        ),
        (
            "mine:broken",
            r"the reward 'broken' gives a tensor \(\) for 1 image; a reward is a function of images, a tensor",
        ),
        ("mine:listed", r"the reward 'listed' gives a list for 1 image; a reward is a function of images, a tensor"),
        (
            "mine:of_pil",
            r"the reward 'of_pil' failed, AttributeError: .*'convert'; a reward is a function of images, a tensor",
        ),
        (
            "mine:of_images_alone",
            r"cannot be called with images and prompts \(too many .*\), as in: def red",
        ),
        ("mine.py:red", r"write MODULE:ATTRIBUTE, as in mine:red"),
        ("folder/mine.py:red", r"write MODULE:ATTRIBUTE, as in mine:red"),
    ],
)
def test_what_cannot_be_a_reward_is_named(module, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        entry(name)


def test_function_may_say_whether_it_is_differentiable():
    def stated(images, prompts):
        raise AssertionError("it is not tried")

    stated.differentiable = False
    assert not plain(stated).differentiable


def test_a_function_that_is_not_tried_tells_its_form_when_it_is_used():
    def listed(images, prompts):
        return [0.5 for _ in images]

    listed.differentiable = False
    with pytest.raises(ValueError, match="the reward .* gives a list for 3 images; a reward is a function of images"):
        plain(listed)(IMAGES, PROMPTS)


def entry_point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, registry.GROUP)


def test_entry_point_registers_its_reward(module, monkeypatch):
    monkeypatch.syspath_prepend(".")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry_point("of-a-plugin", "mine")])
    assert torch.equal(load("of-a-plugin")(IMAGES, PROMPTS), IMAGES[:, 2].mean(dim=(1, 2)))
    assert plugins() == ()


def test_entry_point_that_fails_takes_no_other_along(module, monkeypatch):
    monkeypatch.syspath_prepend(".")
    points = [entry_point("bad", "no_such_module"), entry_point("of-a-plugin", "mine")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    (why,) = plugins()
    assert why.startswith("reward 'bad' of a distribution cannot be loaded: ModuleNotFoundError")
    assert entry("of-a-plugin").summary == "blue"


# ---------------------------------------------------------------------------------------------- parts of a batch


class Counted:
    """brightness, and how often it ran and on how many images."""

    differentiable = True

    def __init__(self):
        self.sizes = []

    def __call__(self, images, prompts):
        self.sizes.append(len(images))
        assert len(images) == len(prompts)
        return (images**2).mean(dim=(1, 2, 3))


def batched(reward, **options):
    from rewards.wrappers.batched import Batched

    return Batched(reward, **options)


def test_parts_change_no_score():
    reward = Counted()
    assert torch.equal(batched(reward, batch_size=2)(IMAGES, PROMPTS), Counted()(IMAGES, PROMPTS))
    assert reward.sizes == [2, 1]
    assert torch.equal(load("colorfulness", batch_size=1)(IMAGES, PROMPTS), load("colorfulness")(IMAGES, PROMPTS))


def test_checkpointed_parts_keep_no_graph_and_give_the_same_gradient():
    images, reward = IMAGES.clone().requires_grad_(), Counted()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        scores = batched(reward, batch_size=1, gradient_checkpointing=True)(images, PROMPTS)
    assert reward.sizes == [1, 1, 1]
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert reward.sizes == [1] * 6  # each part once more
    torch.testing.assert_close(gradient, 2 * IMAGES / IMAGES[0].numel())
    assert sum(kept) <= IMAGES.numel()  # the pixels themselves, and no activation


def test_batch_size_must_be_one_at_least():
    with pytest.raises(ValueError, match="the batch size of a reward is at least 1, not 0"):
        load("brightness", batch_size=0)
