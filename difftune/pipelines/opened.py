"""A pipeline, opened by name and adapted: its LoRAs, what a method makes of its own."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch

from difftune import models
from difftune.errors import UserError
from difftune.pipelines import full_weights
from difftune.pipelines.fingerprint import differ, digest_of, recorded
from difftune.pipelines.lora import WEIGHTS, check_head, mix
from difftune.pipelines.lora import attach as attach_lora
from difftune.processes import say_once


def open_pipeline(model: str, lora: str | Sequence[str] | None = None) -> Any:
    """The pipeline, on the GPU if there is one, with what training wrote to the folder `lora`: a LoRA, or a network.

    Several LoRAs are mixed, each with its share: ["a=0.7", "b=0.3"].
    """
    shares = shares_of([lora] if isinstance(lora, str) else lora or [])
    pipe = models.load(model).to("cuda" if torch.cuda.is_available() else "cpu")
    if shares:
        _adapt(pipe, model, shares)
        _compare(pipe, model, shares)
    return pipe


def _compare(pipe: Any, model: str, folders: Iterable[str]) -> None:
    """Say, of each folder, whether it was trained on other weights: it fits, but it changes what it does not know."""
    now = digest_of(pipe)
    for folder in folders:
        adapter = Path(folder, WEIGHTS)
        then = recorded(adapter if adapter.is_file() else full_weights.folder_of(pipe, folder) / full_weights.FILE)
        if differ(then, now):
            say_once(f"--lora {folder} was trained on a model of digest {then}, and that of {model!r} is {now}")


def shares_of(loras: Sequence[str]) -> dict[str, float]:
    """Shares by folder of FOLDER or FOLDER=SHARE; 1 if none is said. Raises UserError if there is no LoRA."""
    shares: dict[str, float] = {}
    for term in loras:
        folder, share = _divided(term)
        networks = [name for name in ("unet", "transformer") if Path(folder, name).is_dir()]
        if not Path(folder, WEIGHTS).is_file() and not networks:
            raise UserError(f"--lora {folder} holds no {WEIGHTS}: give the --output_dir of a training run")
        if Path(folder, WEIGHTS).is_file():
            check_head(Path(folder, WEIGHTS))
        if Path(folder).resolve() in {Path(other).resolve() for other in shares}:
            raise UserError(f"--lora {folder} is given twice: give it once, with one share")
        if networks and (len(loras) > 1 or share != 1):
            raise UserError(f"--lora {folder} holds a whole network, which cannot be mixed: give it alone")
        shares[folder] = share
    return shares


def _divided(term: str) -> tuple[str, float]:
    """A folder and its share; a folder whose name ends in =SHARE is taken for one if it is there."""
    folder, equals, number = term.rpartition("=")
    if not equals or Path(term).is_dir():
        return term, 1.0
    try:
        share = float(number)
    except ValueError:
        share = nan
    if not isfinite(share):
        raise UserError(f"--lora {term}: the share after '=' is a finite number, as in out=0.5")
    return folder, share


def _adapt(pipe: Any, model: str, shares: Mapping[str, float]) -> None:
    (first, *_) = shares
    try:
        if not Path(first, WEIGHTS).is_file():
            full_weights.load(pipe, first)
        elif list(shares.values()) == [1.0]:
            attach_lora(pipe, first)
        else:
            mix(pipe, shares)
    except UserError:
        raise
    except Exception as error:  # whatever diffusers and peft raise at tensors that are not the model's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the LoRA of {first} does not fit model {model!r}: {reason}") from error
