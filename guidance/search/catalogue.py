"""All search methods, by name: `SEARCHES[name].search(problem, config, saved)` with a `SEARCHES[name].config`."""

from typing import Any, NamedTuple

from guidance.search.baselines import BestOfN, Importance, best_of_n, importance
from guidance.search.dts import DTS, DTSStar, DTSStarPaper, dts, dts_star
from guidance.search.fk import FK, fk
from guidance.search.fkc import FKC, fkc
from guidance.search.problem import Search
from guidance.search.selection import SVDD, Beam, beam, svdd
from guidance.search.tds import TDS, tds


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
    "dts-star-paper": Method(dts_star, DTSStarPaper),
    "best-of-n": Method(best_of_n, BestOfN),
    "importance": Method(importance, Importance),
}
