"""`difftune label`: the page on which a person says which of some pictures is best."""

import signal
from typing import Any

import click

from difftune.cli import options as o
from difftune.cli.command import Command, Flag, Number
from difftune.cli.config_file import CONFIG
from difftune.cli.output import show
from solvers.ranges import Range, Seed


@click.command(
    cls=Command,
    params=[
        CONFIG,
        Flag(["--images"], metavar="FOLDER", required=True, help="What `difftune sample` wrote, or any with a table."),
        Flag(["--prompts"], metavar="FILE", help="JSON, JSON lines or CSV with the prompt of each file."),
        Flag(["--labels"], metavar="FILE", help="File of the labels. If not given: labels.jsonl of the folder."),
        Flag(["--grid"], type=Number(Range(2, 9, whole=True)), default=2, help="Pictures to choose from."),
        o.count("rounds", 1, "How often each picture is shown."),
        Flag(["--seed"], type=o.number(Seed), default=0, help="Seed of which pictures are shown together."),
        Flag(["--port"], type=o.PORT, default=8766, help="Port of the page; 0 takes a free one."),
        o.JSON,
    ],
    short_help="Choose between pictures, on a local page.",
    example="difftune label --images out",
)
def label(as_json: bool, **flags: Any) -> None:
    """Say which of two or more pictures of a prompt is better, on a page of this machine; Ctrl-C ends it.

    Each choice is on the disk before the next one is shown, and can be undone. Started again, it goes on.
    """
    from difftune.labelling.server import open_server

    server = open_server(**flags)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    path = str(server.session.labels.path)
    show({"url": server.url, "labels": path}, as_json, f"{server.url}\nlabels go to {path}")
    with server:
        server.serve_forever()
