"""All search methods, by name: `SEARCHES[name].search(problem, config, saved)` with a `SEARCHES[name].config`."""

from typing import Any, NamedTuple

from guidance.search.dts import DTS, DTSStar, dts, dts_star
from guidance.search.fk import FK, SVDD, TDS, Beam, BestOfN, Importance, beam, best_of_n, fk, importance, svdd, tds
from guidance.search.fkc import FKC, fkc
from guidance.search.problem import Search


class Method(NamedTuple):
    """A search method and its frozen dataclass of settings, whose first sentence is its summary."""

    search: Search
    config: type[Any]


SEARCHES: dict[str, Method] = {
    "fkc": Method(fkc, FKC),
    "fk": Method(fk, FK),
    "tds": Method(tds, TDS),
    "svdd": Method(svdd, SVDD),
    "beam": Method(beam, Beam),
    "dts": Method(dts, DTS),
    "dts-star": Method(dts_star, DTSStar),
    "best-of-n": Method(best_of_n, BestOfN),
    "importance": Method(importance, Importance),
}
