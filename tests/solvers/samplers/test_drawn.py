"""The numbers that are drawn are those of diffusers' pipelines."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from solvers.errors import UserError
from solvers.samplers.catalogue import unit_normal

CPU = torch.device("cpu")


def seeded(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: None, lambda: seeded(1)[0], lambda: seeded(1), lambda: seeded(3)])
def test_numbers_are_those_that_diffusers_draws(make, dtype):
    drawn = []
    for draw in (randn_tensor, unit_normal):
        torch.manual_seed(7)
        drawn.append(draw((3, 4, 8, 8), make(), CPU, dtype))
    assert torch.equal(*drawn) and drawn[1].dtype == dtype and drawn[1].std() > 0.5


def test_a_generator_of_another_device_is_refused():
    with pytest.raises(UserError, match="a generator on cuda:0 draws no numbers for cpu"):
        unit_normal((1, 2), [SimpleNamespace(device=torch.device("cuda:0"))], CPU, torch.float32)
