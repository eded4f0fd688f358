"""What every bench does: measure in paired rounds, keep each measurement as a line of JSON, tell it as a table."""

import hashlib
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from difftune import models

Run = Callable[[], object]


# ------------------------------------------------------------------------------------------------ time


def hardware() -> str:
    """The processor that measures, and torch's version."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, {threads()}"
    return f"{where}, torch {torch.__version__}"


def processor() -> str:
    """The CPU's name."""
    file = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds since some moment: on a CPU this process's own, whatever else runs."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def seconds_of(run: Run) -> float:
    """Seconds of one run, by `clock`; on a GPU, until it is idle again."""
    synchronize()
    began = clock()
    run()
    synchronize()
    return clock() - began


def paired(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round. Within a round every run is done once, in an order of the round's own, so that
    a drift of the machine, and what one leaves behind for the next, fall on all. A first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(runs), len(runs)):
            seconds = seconds_of(runs[name])
            if turn:
                found[name].append(seconds)
    return found


def median_seconds(run: Run, repeats: int) -> float:
    """The median seconds, after one run that is not counted."""
    return statistics.median(paired({"run": run}, repeats)["run"])


class Spread(NamedTuple):
    """A median, its quartiles, and the 95 % interval of the median by order statistics (infinite for fewer than 6)."""

    median: float
    q1: float
    q3: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if math.isfinite(self.low) else ""
        return f"{self.median:.3f}{interval}, quartiles {self.q1:.3f} to {self.q3:.3f}"


def spread(values: Sequence[float]) -> Spread:
    """The median and quartiles of one value or more."""
    ordered, n = sorted(values), len(values)
    q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if n > 1 else ordered * 3
    rank = outer_rank(n)
    low, high = (ordered[rank - 1], ordered[n - rank]) if rank else (-math.inf, math.inf)
    return Spread(statistics.median(ordered), q1, q3, low, high)


def outer_rank(n: int) -> int:
    """The greatest r with P(Binomial(n, 1/2) < r) <= 2.5 %: the r-th smallest and the r-th greatest of n values hold
    the median between them with 95 %; 0 if no two do."""
    below, rank = 0.0, 0
    while rank < n:
        below += math.comb(n, rank) / 2**n
        if below > 0.025:
            break
        rank += 1
    return rank


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """The spread of each run's ratios to `base`, pair by pair."""
    return {
        name: spread([a / b for a, b in zip(values, seconds[base], strict=True)])
        for name, values in seconds.items()
        if name != base
    }


# ------------------------------------------------------------------------------------------------ memory


def peak_memory() -> int | None:
    """The most bytes that the GPU's allocator held since `reset_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def reset_peak() -> int:
    """Forget the peak so far. Returns the bytes that are held now."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


# ------------------------------------------------------------------------------------------------ what was measured


@cache
def weights(*names: str) -> str:
    """A digest of embedded models' contents: what was measured with others is measured again."""
    files = sorted(file for name in names for file in models.path(name).rglob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


class Store:
    """A file with a line of JSON for each measurement, under its key; what stands there is not measured again."""

    def __init__(self, file: str | Path):
        self.file = Path(file)

    def read(self) -> dict[str, dict[str, Any]]:
        """Every measurement by its key; a line that was cut off counts as not measured."""
        found = {}
        for line in self.file.read_text().splitlines() if self.file.is_file() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found[entry.pop("key")] = entry
        return found

    def measured(self, key: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The measurement of that key: read, or made and written."""
        found = self.read().get(key)
        return self.write(key, measure()) if found is None else found

    def write(self, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Append a measurement, on a line of its own also after one that was cut off. Returns it as it is read."""
        text = json.dumps({"key": key, **entry})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(("\n" if self.file.stat().st_size else "") + text + "\n")
        return {name: value for name, value in json.loads(text).items() if name != "key"}


# ------------------------------------------------------------------------------------------------ tables


def row(cells: Iterable[Any]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def heading(columns: Sequence[str]) -> str:
    return f"{row(columns)}\n|{'---|' * len(columns)}"


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    return "\n".join([heading(columns), *map(row, rows)])
