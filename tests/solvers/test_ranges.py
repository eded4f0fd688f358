"""Every number of a setting has a range, checked where the settings are made."""

from dataclasses import dataclass
from math import inf, nan
from typing import Annotated

import pytest
from torch import Tensor, tensor

from solvers.errors import UserError
from solvers.ranges import Count, Decay, Positive, Range, Ranged, Share, range_of, ranges


@dataclass(frozen=True)
class Settings(Ranged):
    rank: Count | None = 4
    decay: Decay = 0.9
    share: Share | Tensor = 0.5
    sigma: Annotated[float, Range(0, above=True, infinite=True)] = 1.0
    weights: tuple[Positive, ...] = ()
    target: float | None = None
    either: int | float | None = None
    name: str = "a"
    on: bool = True


WRONG = [
    ({"rank": 0}, "rank is 0: it must be at least 1"),
    ({"rank": 2.5}, "rank is 2.5: it must be at least 1, and a whole number"),
    ({"decay": 1.0}, "decay is 1.0: it must be at least 0 and below 1"),
    ({"decay": nan}, "decay is nan: it must be at least 0 and below 1, and finite"),
    ({"share": -0.1}, "share is -0.1: it must be from 0 to 1"),
    ({"sigma": 0.0}, "sigma is 0.0: it must be above 0"),
    ({"sigma": nan}, "sigma is nan"),
    ({"weights": (1.0, -2.0)}, "weights is -2.0: it must be above 0"),
    ({"target": inf}, "target is inf: it must be a finite number"),
    ({"either": "x"}, "either is 'x': it must be a number"),
    ({"decay": [0.5]}, "decay is '[0.5]': it must be a number"),
    ({"rank": -(10**5000)}, "rank is a number of about 5000 digits: it must be at least 1"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG)
def test_number_out_of_its_range_is_named(settings, sentence):
    with pytest.raises(UserError) as error:
        Settings(**settings)
    assert str(error.value).startswith(sentence)


def test_numbers_in_their_ranges_and_what_is_no_number_pass():
    Settings(rank=None, decay=0, share=tensor([0.5, 7.0]), sigma=inf, weights=(1, 2.5), target=-3)


def test_ranges_are_of_the_numbers_alone():
    assert set(ranges(Settings)) == {"rank", "decay", "share", "sigma", "weights", "target", "either"}
    assert range_of(str) is None and range_of(bool) is None
    assert str(ranges(Settings)["rank"]) == "at least 1"
