"""The main job on the embedded models, offline: guidance swapped, a LoRA trained, a noise optimised, a search run."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from difftune.demo import report
from difftune.demo.budget import Budget
from difftune.demo.screen import shown
from difftune.demo.stages import STAGES, TRAINED, Stage
from difftune.errors import UserError
from difftune.files import output
from difftune.files.claim import claimed

MARK = ".difftune-demo"  # what tells a demo's folder from any other
EARLIER = ".earlier"  # where the files of the demo before lie meanwhile
WRITTEN = (MARK, TRAINED, "reno", "report.html", "metrics.json", "log.txt")


def run_demo(output_dir: str | Path = "runs/demo", seed: int = 0, budget: Budget | None = None) -> dict[str, Any]:
    """All stages; writes report.html, metrics.json and log.txt, and returns what metrics.json holds."""
    budget, began, log = budget or Budget(), time.perf_counter(), io.StringIO()
    found: dict[str, Stage] = {}
    with _replaced(output_dir) as folder, shown(log) as screen:
        for name, stage in STAGES.items():
            since = time.perf_counter()
            found[name] = stage(budget, seed, folder)
            screen.line(f"{found[name].said} ({time.perf_counter() - since:.0f} s)")
        metrics: dict[str, Any] = {name: stage.metrics for name, stage in found.items()}
        metrics["seconds_total"] = round(time.perf_counter() - began, 1)
        output.write(folder / "report.html", report.render(found, metrics, seed))
        output.write(folder / "log.txt", log.getvalue())
        output.write_json(folder / "metrics.json", metrics)
    return metrics


def summarise(metrics: dict[str, Any]) -> str:
    """The three numbers: what training and ReNO raised the oracle by, and the search the reward over best-of-N."""
    trained, noise, search = metrics["alignprop"], metrics["reno"], metrics["search"]
    return (
        f"{trained['recipe']} {trained['oracle_difference']['score']:+.3f} and reno "
        f"{noise['oracle_difference']['score']:+.3f} of the oracle, {search['method']} "
        f"{search['reward_difference']['score']:+.4f} of the reward over best-of-n"
    )


@contextmanager
def _replaced(output_dir: str | Path) -> Iterator[Path]:
    """The folder, empty and ours alone; an earlier demo comes back if this one fails, or was killed.

    Raises UserError for a folder that is not a demo's, and where another process has it.
    """
    with claimed(output_dir) as claim:
        claim.clear()
        folder = claim.path
        _bring_back(folder)
        held = claim.held()
        if held and MARK not in held:
            raise UserError(f"{folder} holds another run ({held[0]}): nothing was written, choose another --output_dir")
        with output.written(folder):
            (folder / EARLIER).mkdir()
            for name in held:
                (folder / name).rename(folder / EARLIER / name)
        claim.note(*WRITTEN)
        try:
            claim.write(MARK, "")
            yield folder
        except BaseException:
            claim.clear()
            _bring_back(folder)
            raise
        claim.end(EARLIER)


def _bring_back(folder: Path) -> None:
    """Put back the files of the demo before the one that was cleared."""
    if (folder / EARLIER).is_dir():
        with output.written(folder):
            for path in (folder / EARLIER).iterdir():
                path.rename(folder / path.name)
            (folder / EARLIER).rmdir()
