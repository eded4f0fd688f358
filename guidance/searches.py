"""All search methods, by name: `SEARCHES[name].search(problem, config, saved)` with a `SEARCHES[name].config`."""

from typing import Any, NamedTuple

from guidance.dts import DTS, DTSStar, dts, dts_star
from guidance.problem import Search


class Method(NamedTuple):
    """A search method and its frozen dataclass of settings, whose first sentence is its summary."""

    search: Search
    config: type[Any]


SEARCHES: dict[str, Method] = {
    "dts": Method(dts, DTS),
    "dts-star": Method(dts_star, DTSStar),
}
