"""Records as tensors and JSON: what is encoded and decoded is what it was."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from guidance.codec import apart, decode, encode


class Made(NamedTuple):
    image: Tensor
    total: float


@dataclass(frozen=True)
class Progress:
    z: Tensor
    step: int
    prompts: tuple[str, ...]
    best: Made | None = None
    told: tuple[Tensor, ...] = ()
    made: list[Made] = field(default_factory=list)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)
    pair: tuple[Tensor, float] | None = None
    done: bool = False


def numbers(start: int) -> Tensor:
    return torch.arange(start, start + 3).float()


FULL = Progress(
    z=numbers(0),
    step=3,
    prompts=("a circle.", "two"),
    best=Made(numbers(3), 0.5),
    told=tuple(numbers(i) for i in range(12)),
    made=[Made(numbers(6), 1.0), Made(numbers(9), -2.0)],
    memory={"apg.update": numbers(1), "cache": numbers(2)},
    moments={"exp_avg": {"down.0.weight": numbers(4)}, "step": {"down.0.weight": 7}},
    pair=(numbers(5), 0.25),
    done=True,
)
BARE = Progress(z=numbers(0), step=0, prompts=())


def same(a: Any, b: Any) -> bool:
    """Whether two records are equal, tensors by value."""
    one, other = encode(a), encode(b)
    equal = one.tensors.keys() == other.tensors.keys() and one.info == other.info
    return equal and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize("record", [FULL, BARE])
def test_a_record_comes_back_from_safetensors_and_json(record):
    tensors, info = encode(record)
    again = decode(Progress, load(save(apart(tensors))), json.loads(json.dumps(info)))
    assert same(again, record) and type(again.told) is tuple and type(again.prompts) is tuple
    assert type(again.best) is type(record.best)


def test_names_are_dotted_and_numbers_are_json():
    tensors, info = encode(FULL)
    assert {"z", "best.image", "told.000011", "made.000001.image", "memory.apg.update"} < tensors.keys()
    assert "moments.exp_avg.down.0.weight" in tensors and "pair.000000" in tensors
    assert info["best"] == {"total": 0.5} and info["prompts"] == ["a circle.", "two"]
    assert info["moments"] == {"step": {"down.0.weight": 7}} and info["made"]["000001"] == {"total": -2.0}
    assert "best" not in encode(BARE).info and "told" in encode(BARE).info


def test_order_is_the_index_s_and_not_the_name_s():
    tensors = {"10": numbers(10), "9": numbers(9)}  # as another wrote them, without zeros
    assert [t[0].item() for t in decode(tuple[Tensor, ...], tensors)] == [9, 10]


def test_what_is_absent_and_has_no_default_is_named():
    tensors, info = encode(FULL)
    with pytest.raises(KeyError, match="best.image"):
        decode(Progress, {k: v for k, v in tensors.items() if k != "best.image"}, info)
    with pytest.raises(KeyError, match="step"):
        decode(Progress, tensors, {k: v for k, v in info.items() if k != "step"})


def test_what_could_not_be_read_back_is_refused():
    with pytest.raises(ValueError, match="'a.b' has a dot"):
        encode({"a.b": Made(numbers(0), 1.0)})
    with pytest.raises(TypeError, match="object"):
        encode({"a": object()})


def test_apart_shares_no_memory():
    x = torch.zeros(4)
    found = apart({"a": x, "b": x[1:]})
    found["a"].add_(1)
    assert x.sum() == 0 and found["b"].sum() == 0
