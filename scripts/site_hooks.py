"""What `mkdocs build` calls: pages of the API reference, one for each package, made from what `difftune` exports."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PAGES = {  # package -> title and first sentence
    "difftune": ("Pipelines, training, noise and search", "What works on whole pipelines."),
    "guidance": ("Guidance", "Methods, and what puts them into a pipeline or into a loop of your own."),
    "rewards": ("Rewards", "What judges pictures."),
    "solvers": ("Solvers", "Noise levels, samplers, and gradients through them."),
}
BESIDE = {  # package -> a heading, and by their modules the names below it, which are documented and not exported
    "difftune": (
        "What they give back",
        {"difftune.search_runs.search": ("Search", "Found", "Point"), "difftune.reno.results": ("Result", "Live")},
    ),
    "guidance": (
        "What attach gives back, and what a method of your own is written with",
        {
            "guidance.attach.handle": ("Handle",),
            "guidance.contract": ("Guidance", "Guide", "Preds"),
            "guidance.methods.scales": ("Neutral", "Scaled", "Usual", "ratio", "time"),
        },
    ),
}


def pages() -> dict[str, str]:
    """The Markdown of each page by its path: a heading, and a directive of mkdocstrings for each public name."""
    from difftune import _HOME  # imports no torch

    found = {}
    for package, (title, about) in PAGES.items():
        names = [name for name in sorted(_HOME) if _HOME[name].split(".")[0] == package]
        parts = [f"# {title}\n\n{about} `from difftune import NAME` finds each of them.\n"]
        parts += [f"::: {place(name, _HOME[name])}\n" for name in names]
        if package in BESIDE:
            heading, places = BESIDE[package]
            parts.append(f"## {heading}\n")
            parts += [f"::: {module}.{name}\n" for module, own in places.items() for name in own]
        found[f"api/{package}.md"] = "\n".join(parts)
    return found


def place(name: str, home: str) -> str:
    """Where a public name is defined, as mkdocstrings names it."""
    module, colon, attribute = home.partition(":")
    return module if colon and not attribute else f"{module}.{attribute or name}"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, as if they lay in docs/."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
