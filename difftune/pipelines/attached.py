"""`attach` for methods that name their parts: prompts as text, and a weaker model by its name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from difftune.pipelines.method_parts import equip
from guidance import attach as core
from guidance.attach.handle import Handle
from guidance.contract import Guidance, check_method
from guidance.methods.catalogue import NAG, NASA, AutoGuidance, MultiCondition, PerpNeg

OF_PIPELINE = (AutoGuidance, MultiCondition, NAG, NASA, PerpNeg)  # their parts depend on the pipeline, not on prompts


def attach(pipe: Any, guidance: Guidance, networks: Mapping[str, nn.Module] | None = None) -> Handle:
    """Make `pipe` follow `guidance` until the handle is detached; the handle is also a context manager.

    What a method gives as text is encoded by the pipeline: NAG(negative="blurry"), NASA(negative="blurry"),
    PerpNeg(negatives=("a dog",)), MultiCondition(conds=("cond", "a dog")). AutoGuidance(network="tiny-weak") loads the
    network of that model; `networks`, {"weak": unet}, gives one that is loaded already.

    The scale that the pipeline is called with only decides whether it prepares the unconditional branch (> 1); the
    method's own scale guides, and a warning says so once if a caller chose another. `guidance_rescale`, SD3's
    skip-layer call and Qwen-Image's norm stay in force. Raises ValueError for a pipeline, scheduler or method that
    cannot be followed, and for a pipeline that is attached to already; the page of the families lists them.
    """
    check_method(guidance)
    method, found = equipped(pipe, guidance, networks or {})
    return core.attach(pipe, method, {**found, **(networks or {})})


def equipped(pipe: Any, guidance: Guidance, networks: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The method with its parts, and the networks that it names beside those that were given."""
    inner: Any = guidance
    while "method" in vars(inner):
        inner = inner.method
    if not isinstance(inner, OF_PIPELINE) or (isinstance(inner, AutoGuidance) and inner.network in networks):
        return guidance, {}
    found = equip(pipe, guidance)
    return found.method(()), found.networks
