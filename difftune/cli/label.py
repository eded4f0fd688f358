"""`difftune label`: the page on which a person says which of some pictures is best."""

import json
import signal
import sys
from contextlib import redirect_stdout
from typing import Any

import click

from difftune.cli import options as o
from difftune.cli.command import Command
from difftune.cli.config_file import CONFIG


@click.command(cls=Command, params=[CONFIG, o.JSON])
@click.option("--images", metavar="FOLDER", required=True, help="What `difftune sample` wrote, or any with a table.")
@click.option("--prompts", metavar="FILE", help="JSON, JSON lines or CSV that tells the prompt of each file.")
@click.option("--labels", metavar="FILE", help="Where labels go, and went before: labels.jsonl of the folder.")
@click.option("--grid", type=click.IntRange(2, 9), default=2, show_default=True, help="Pictures to choose from.")
@click.option("--rounds", type=o.AT_LEAST_ONE, default=1, show_default=True, help="How often each picture is shown.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of who is shown with whom.")
@click.option("--port", type=click.IntRange(0, 65535), default=8766, show_default=True, help="0 takes a free one.")
def label(as_json: bool, **flags: Any) -> None:
    """Say which of two or more pictures of a prompt is better, on a page of this machine; Ctrl-C ends it.

    Each choice is on the disk before the next one is shown, and can be undone. Started again, it goes on.
    """
    with redirect_stdout(sys.stderr):
        from difftune.labelling.server import open_server

        server = open_server(**flags)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    path = str(server.session.labels.path)
    click.echo(json.dumps({"url": server.url, "labels": path}) if as_json else f"{server.url}\nlabels go to {path}")
    with server:
        server.serve_forever()
