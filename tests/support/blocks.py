"""The blocks of code in the README and the docs, run one after another as a reader would, in an empty folder.

A comment in front of a block says what is not plain: `<!-- slow -->` (it takes more than a few seconds) or
`<!-- not run: REASON -->`. Blocks of Python on a page share their names; what a page leaves to the reader stands in an
invisible block, `<!-- invisible-code-block: python ... -->`.
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import click
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from difftune.cli.program import cli
from tests.support import dits, pipelines

CHECKPOINTS = {  # ids of the Hub that the pages name -> a small random pipeline of the same layout
    "stabilityai/sd-turbo": pipelines.sd_turbo,
    "black-forest-labs/FLUX.1-dev": lambda: dits.flux(guidance_embeds=True),
}
COMMENT = re.compile(r"<!-- (slow|not run: .+?) -->\s*\Z")


def blocks_of(page: Path) -> Document:
    """The page, with its blocks of Python and of shell commands as Sybil's examples."""
    return Sybil([PythonCodeBlockParser(), CodeBlockParser("bash", run_commands)]).parse(page)


def comment_before(example: Example) -> str:
    """What the comment in front of a block says: "slow", "not run: REASON", or nothing."""
    found = COMMENT.search(example.document.text[: example.region.start])
    return found[1] if found else ""


def save_checkpoints(page: Path) -> None:
    """Write a random pipeline where each id of the Hub that the page names is looked up first: in this folder."""
    text = page.read_text()
    for name, make in CHECKPOINTS.items():
        if name in text:
            make().save_pretrained(name)


# ------------------------------------------------------------------------------------------------ shell commands


def run_commands(example: Example) -> None:
    """Run every command of a block in this process, and write its output where it is redirected."""
    for words, target in commands_of(str(example.parsed)):
        output = StringIO()
        with redirect_stdout(output):
            code = cli.main(words, prog_name="difftune")
        assert not code, f"{shlex.join(words)} ended with {code}"
        if target:
            Path(target).write_text(output.getvalue())


def check_commands(example: Example) -> None:
    """Check every command of a block, its flags and their values, without running it.

    Of a block that is not run, the lines that call difftune: also by `accelerate launch -m difftune`.
    """
    for words, _ in commands_of(str(example.parsed), comment_before(example).startswith("not run")):
        command: click.Command = cli
        context = None
        while isinstance(command, click.Group):
            context = click.Context(command, parent=context, info_name=command.name)
            command = command.get_command(context, words.pop(0)) or command
        command.make_context(command.name, words, parent=context)


def commands_of(block: str, others: bool = False) -> Iterator[tuple[list[str], str | None]]:
    """Each `difftune` command's arguments and the file that its output goes to; raises ValueError for another one,
    unless `others` may stand in the block."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if others and "difftune" in words:
            words = words[words.index("difftune") :]
        if not words or (others and words[0] != "difftune"):
            continue
        if words[0] != "difftune":
            raise ValueError(f"{line!r} is not a difftune command: say <!-- not run: REASON --> in front of the block")
        target = words[words.index(">") + 1] if ">" in words else None
        yield words[1 : words.index(">") if target else None], target
