"""What a pipeline does not read of a prompt that is longer than its tokenizers take."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

from solvers.errors import Caution

TOLD: "WeakSet[Any]" = WeakSet()  # the pipelines of which it was said
MOST = 60  # characters of a text in the sentence


def caution_unread(pipe: Any, prompts: Sequence[str]) -> None:
    """Warn (`Caution`), once of a pipeline, of the first prompt that it reads in part."""
    if pipe in TOLD:
        return
    for prompt in prompts:
        if rest := unread(pipe, prompt):
            TOLD.add(pipe)
            warnings.warn(f"the model does not read all of {_short(prompt)!r}: it leaves out {rest!r}", Caution, 3)
            return


def unread(pipe: Any, prompt: str) -> str:
    """The end of the prompt that no tokenizer of the pipeline has room for, shortened; "" if one has."""
    rests = []
    for tokenizer, room in tokenizers_of(pipe):
        tokens = tokenizer(prompt, verbose=False).input_ids
        if len(tokens) <= room:
            return ""
        rests.append(tokenizer.decode(tokens[room - 1 :], skip_special_tokens=True))
    return _short(min(rests, key=len).strip()) if rests else ""


def tokenizers_of(pipe: Any) -> Iterator[tuple[Any, int]]:
    """The tokenizers, each with the tokens that the pipeline gives it, an end among them."""
    functions = (type(pipe).__call__, pipe.encode_prompt)  # the call's own default wins where both have one
    found = [inspect.signature(function).parameters.get("max_sequence_length") for function in functions]
    others = next((parameter.default for parameter in found if parameter is not None), None)
    for name, tokenizer in pipe.components.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            own = tokenizer.model_max_length
            clip = "CLIP" in type(tokenizer).__name__
            yield tokenizer, own if clip or others is None else min(own, others)


def _short(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 15]}... ({len(text)} characters)"
