"""Guidance for diffusion models: what a sampler follows at each step.

    from guidance import CFG, Branch, Guided  # methods, and what one of your own is written with
    from guidance.attach import attach  # on a diffusers pipeline
    from guidance.guided import guided  # in our own loop

Where things are, in the order in which to read them:

    contract.py   what a method yields, is sent and returns, and the driver that runs it
    methods/      all methods; cfg.py is the shortest
    branches.py   the evaluations that a method asked for, in as few forwards as can be
    guided.py     methods in our own loop        attach/      methods inside a pipeline's own call
    guider.py     methods as diffusers' guiders  invert.py    from an image back to its noise
    search/       search for a better sample     codec.py, files.py   what a search keeps on the disk

The names are imported when they are first used.
"""

from importlib import import_module
from typing import Any

__distribution__ = "difftune"

_HOME = {  # public name -> its module
    **dict.fromkeys(("Branch", "Guidance", "Guide", "Guided", "Preds"), "guidance.contract"),
    **dict.fromkeys(("Neutral", "Scaled", "Usual", "ratio", "time"), "guidance.methods.scales"),
    "end_of_step": "guidance.methods.ahead",
}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    catalogue = import_module("guidance.methods.catalogue")
    home = import_module(_HOME[name]) if name in _HOME else catalogue
    if name not in _HOME and name not in catalogue.__all__:
        raise AttributeError(f"guidance has no {name!r}; it has {', '.join(sorted([*_HOME, *catalogue.__all__]))}")
    return vars(home)[name]
