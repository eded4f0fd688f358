"""`difftune rewards`."""

import signal
from collections.abc import Sequence
from dataclasses import asdict, fields
from math import isfinite
from typing import Any

import click

from difftune.cli import options as o
from difftune.cli.command import Command, Flag
from difftune.cli.output import paragraphs, said, show


@click.group(short_help="List, describe, fetch and serve rewards.")
def rewards() -> None:
    """List, describe, fetch and serve rewards."""


@rewards.command("list", cls=Command, params=[o.JSON], short_help="List every reward.", example="difftune rewards list")
def list_rewards(as_json: bool) -> None:
    """Every reward, those of other distributions too: what it asks for and gives."""
    from rewards.registry import REWARDS, plugins

    for why in plugins():
        click.echo(f"difftune: {why}", err=True)
    found = [_facts(name, entry) for name, entry in sorted(REWARDS.items())]
    show(found, as_json, paragraphs([(f["name"], f["summary"], _asks(f)) for f in found]))


@rewards.command(
    "info",
    cls=Command,
    params=[o.JSON, click.Argument(["name"])],
    short_help="Show all that is known of a reward.",
    example="difftune rewards info tiny-clip",
)
def reward_info(name: str, as_json: bool) -> None:
    """All that is known of a reward: NAME, or module:attribute."""
    from rewards.registry import stated

    entry, known = stated(name)
    found = _facts(name, entry) | ({} if known else {"differentiable": "tried when it is loaded"})
    found["files"] = _locked(found.pop("weights"))
    told = found | {"memory_mb": _memory(found["memory_mb"])}
    show(found, as_json, "\n".join(f"{key}: {_fact(value)}" for key, value in told.items()))


@rewards.command(
    "prefetch",
    cls=Command,
    params=[
        click.Argument(["name"], nargs=-1, required=True),
        Flag(["--model"], metavar="HUB_ID", help="Model to fetch, for rewards that take any: the option `model`."),
    ],
    short_help="Download all that rewards need.",
    example="difftune rewards prefetch pickscore hps-v2.1",
)
def prefetch(name: Sequence[str], model: str | None) -> None:
    """Download and verify all that the rewards need: then they load with HF_HUB_OFFLINE=1.

    NAME may have options, which decide what that is: "open-clip[model=ViT-B-16, pretrained=laion2b_s34b_b88k]".
    """
    from rewards.hub import prefetch as fetch
    from rewards.registry import entry

    for one in name:
        entry(one)

    files = [file for one in name for file in fetch(one, **({"model": model} if model else {}))]
    show(None, False, "\n".join(map(str, files)) or "nothing to download")


@rewards.command(
    "serve",
    cls=Command,
    params=[
        click.Argument(["name"]),
        Flag(["--host"], default="127.0.0.1", help="Where to listen; elsewhere needs a token."),
        Flag(["--port"], type=o.PORT, default=8765, help="Port; 0 takes a free one."),
        Flag(["--token"], metavar="TEXT", envvar="DIFFTUNE_REWARD_TOKEN", default="", help="What clients must know."),
        o.count("batch_size", None, "Images that the reward scores at a time. If not given: all of a request."),
        o.count("max_images", 64, "Images of one request, at most."),
        Flag(["--device"], metavar="NAME", default="cpu", help="Where the reward runs."),
        o.JSON,
    ],
    short_help="Serve a reward over HTTP.",
    example="difftune rewards serve tiny-clip --port 8765",
)
def serve(name: str, batch_size: int | None, max_images: int, as_json: bool, **place: Any) -> None:
    """Serve a reward over HTTP, for `--reward http://HOST:PORT` elsewhere; Ctrl-C ends it.

    The token is better given in DIFFTUNE_REWARD_TOKEN than on the command line, where other users see it.
    """
    from rewards.network.remote import Limits, Server
    from rewards.registry import load

    server = Server(load(name, batch_size), limits=Limits(images=max_images), **place)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    show({"url": server.url, "reward": name}, as_json, f"{name} at {server.url}")
    with server:
        server.serve_forever()


def _facts(name: str, entry: Any) -> dict[str, Any]:
    facts = {
        f.name: getattr(entry, f.name) for f in fields(entry) if f.name not in ("make", "fetch", "wraps", "of_options")
    }
    low, high = entry.range
    return {"name": name, **facts, "range": [low, high] if isfinite(low) and isfinite(high) else None}


def _asks(facts: dict[str, Any]) -> str:
    """What a reward asks for and gives, in words."""
    said = [
        "no range of its own" if facts["range"] is None else "{:g} to {:g}".format(*facts["range"]),
        f"{'higher' if facts['higher_is_better'] else 'lower'} is better",
        "reads the prompt" if facts["needs_prompt"] else "reads no prompt",
        "a gradient" if facts["differentiable"] else "no gradient",
        f"licence: {facts['licence']}",
        f"weights: {_memory(facts['memory_mb'])}",
    ]
    extra = [f"needs the extra difftune[{facts['extra']}]"] if facts["extra"] else []
    return "; ".join([*said, *extra])


def _memory(size: int | None) -> str:
    """The memory of a reward's weights, in words."""
    if size is None:
        return "those of what you name"
    return f"{size} MB in float32" if size else "none"


def _locked(names: Sequence[str]) -> list[dict[str, Any]]:
    """What lock.json says of those files."""
    if not names:
        return []
    from rewards.hub import locks

    return [asdict(locks()[name]) for name in names]


def _fact(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n  {key}: {_fact(inner)}" for item in value for key, inner in item.items())
    if isinstance(value, list):
        return " to ".join(map(str, value)) or "none"
    return said(value) if isinstance(value, bool) else "none" if value is None else str(value)
