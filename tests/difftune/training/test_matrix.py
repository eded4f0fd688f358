"""Every recipe with LoRA and full weights, in every precision, with its reference and without, over one pass and two:
each runs, or is refused before anything is loaded."""

from itertools import product

import pytest
import torch

from difftune.errors import UserError
from difftune.recipes import RECIPES, train
from rewards.simple import Brightness
from tests.support import pipelines
from tests.support.toys import toy

PRECISIONS = ("no", "bf16", "fp16")
AT_THE_REFERENCE = {"d3po": ("log_ratio", 0.0), "dpo": ("winner_gap", 0.0), "kto": ("good_gain", 0.0)}
AT_THE_REFERENCE |= {
    "pso": ("margin", 0.0),
    "dragon": ("positive_gap", 0.0),
    "ddpo": ("approx_kl", 0.0),
    "grpo": ("approx_kl", 0.0),
    "nft": ("old_gap", 0.0),
    "adjoint-matching": ("control", 0.0),
    "hypernoise": ("kl", 0.0),
}


def cases(name: str) -> list[dict]:
    """The settings of a recipe in the matrix."""
    term = RECIPES[name].reference  # a setting that asks for the reference
    references = [{term: 0.0}, {term: 0.1}] if isinstance(term, str) else [{}]
    found = product(references, (False, True), PRECISIONS, (1, 2))
    return [
        {**reference, "full_finetuning": full, "mixed_precision": precision, "gradient_accumulation_steps": passes}
        for reference, full, precision, passes in found
    ]


def run_one(name: str, folder, case: dict) -> None:
    config = toy(
        name,
        folder,
        max_train_steps=1,
        learning_rate=1e-4,
        **case,
        **({"num_win_rate_images": 0} if name == "dragon" else {}),
    )
    if case["mixed_precision"] == "fp16" and not torch.cuda.is_available():
        with pytest.raises(UserError, match="mixed_precision 'fp16' needs a GPU"):
            train(config, None, None, Brightness())
        return
    if name == "hypernoise" and case["full_finetuning"]:  # its noise is moved by a LoRA beside the model
        with pytest.raises(UserError, match="leave full_finetuning out"):
            train(config, None, None, Brightness())
        return
    ((metrics, state),) = train(config, None, pipelines.sd(), Brightness())
    assert metrics["skipped"] == 0 and 0 < metrics["grad_norm"] < float("inf"), metrics
    assert all(tensor.isfinite().all() for tensor in state.tensors.values())
    if name in AT_THE_REFERENCE:
        key, value = AT_THE_REFERENCE[name]
        assert metrics[key] == value, (key, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_combination_runs_or_is_refused(name, tmp_path):
    for case in cases(name):
        run_one(name, tmp_path, case)


@pytest.mark.parametrize("name", [n for n, recipe in RECIPES.items() if recipe.reference and n != "hypernoise"])
@pytest.mark.sampled(3)
def test_full_weights_in_bf16_are_compared_with_a_reference_that_rounds_as_they_do(name, tmp_path):
    """At the first step the two agree bit for bit, so that no ratio is noise."""
    run_one(name, tmp_path, cases(name)[-4])


def test_a_second_run_of_a_process_has_a_precision_of_its_own(tmp_path):
    first = {}
    for precision in ("no", "bf16", "no"):
        config = toy("alignprop", tmp_path, max_train_steps=1, mixed_precision=precision)
        ((metrics, _),) = train(config, None, pipelines.sd(), Brightness())
        first.setdefault(precision, metrics["loss"])
        assert metrics["loss"] == first[precision]
    assert first["no"] != first["bf16"]
