"""Try what people put beside guidance on a small pipeline of several families, and write what came of it to
docs/families.md: caching, offloading.

    python scripts/make_beside.py
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from diffusers.hooks import FirstBlockCacheConfig  # noqa: E402

from difftune.files.output import write  # noqa: E402
from guidance.attach.handle import attach  # noqa: E402
from guidance.methods.cfg import CFG  # noqa: E402
from solvers.families.table import family_of  # noqa: E402
from tests.guidance.methods.test_conformance import KINDS, OF_KIND, SCALE, SCHEDULERS, run  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- made by scripts/make_beside.py -->", "<!-- end of what was tried -->"
TRIED = ("flux", "qwen", "wan")
CPU = torch.device("cpu")


def cached(config: Any) -> Callable[[Any, str], None]:
    return lambda pipe, name: pipe.components[name].enable_cache(config)


def offloaded(kind: str) -> Callable[[Any, str], None]:
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe, name: pipe.components[name].enable_group_offload(CPU, CPU, offload_type=kind, **groups)


BESIDE: dict[str, Callable[[Any, str], None]] = {
    "FirstBlockCache": cached(FirstBlockCacheConfig()),
    "group offload, blocks": offloaded("block_level"),
    "group offload, leaves": offloaded("leaf_level"),
}


def tried(kind: str, change: Callable[[Any, str], None]) -> str:
    """What `attach(CFG)` gives beside the change, against the pipeline with it: or the first words of the error."""
    pipe = KINDS[kind].make(SCHEDULERS[OF_KIND[kind][0]](), num_layers=2)  # a head and a tail for the cache
    try:
        change(pipe, family_of(pipe).denoisers[0])
        stock = run(kind, pipe)
    except Exception as error:  # diffusers has none for this network
        return f"diffusers: {type(error).__name__}"
    try:
        with attach(pipe, CFG(SCALE)):
            ours = run(kind, pipe)
    except ValueError as refusal:
        return "one sentence" if "disable_cache" in str(refusal) else f"refused: {refusal}"
    if torch.equal(ours, stock):
        return "bit-equal"
    return f"differs by {float((ours - stock).abs().max() / stock.abs().max()):.0e}"


def block() -> str:
    """The table as it stands in the page."""
    heads = ["family", *BESIDE]
    lines = [
        heads,
        ["---"] * len(heads),
        *([f"`{kind}`", *(tried(kind, c) for c in BESIDE.values())] for kind in TRIED),
    ]
    return "\n\n".join([BEGIN, "\n".join(f"| {' | '.join(line)} |" for line in lines), END])


def main() -> None:
    warnings.simplefilter("ignore")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    write(PAGE, (before + block() + rest.partition(END)[2]).encode())


if __name__ == "__main__":
    main()
