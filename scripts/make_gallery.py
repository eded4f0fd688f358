"""Runs the commands of docs/gallery.md and of the methods' and recipes' pages, and puts their pictures, and the
README's strip, in their places.

    python scripts/make_gallery.py --folder build/gallery [gallery guidance/pag ...]

A comment below each picture says where it lies, from its page, and what it is made of:
`<!-- picture: images/gallery/x.png = out/x/grid.png -->`. A command that has ended well in that folder is not run
again.
"""

import argparse
import base64
import io
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = DOCS / "gallery.md"
DONE = Path("done.txt")  # the commands that have ended well, a line each
STRIP = ROOT / "docs" / "images" / "strip.png"
PICTURE = re.compile(r"<!-- picture: (\S+) = (.+?) -->")
CURVES = re.compile(r'class="curve"[^>]*base64,([^"]+)"')
SIDE, GAP, APART, LINE = 128, 6, 34, 30  # of the strip, in pixels
# Title, and (label, files of the two pictures): i is the seed, j and k the number among the pictures of two prompts.
GROUPS = (
    (
        "guidance",
        [
            (name, f"out/{folder}/0000{{i}}-seed{{i}}.png")
            for name, folder in (("none", "none"), ("CFG 4", "cfg"), ("APG 8", "apg"), ("CFG++ 0.6", "cfgpp"))
        ],
    ),
    (
        "fine-tuning: AlignProp",
        [("before", "out/before/0000{j}-seed{i}.png"), ("after", "out/after/0000{j}-seed{i}.png")],
    ),
    ("noise: ReNO", [("before", "out/reno/00{k}-before.png"), ("after", "out/reno/00{k}-after.png")]),
)


def commands(page: str) -> Iterator[list[str]]:
    """The words of every `difftune` command of the page, in order."""
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("difftune "):
                yield shlex.split(line)[1:]


def drawn(page: str) -> str:
    """The sections of a page whose pictures are made here."""
    sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    return "".join(section for section in sections if PICTURE.search(section) or STRIP.name in section)


def pages() -> dict[str, Path]:
    """The pages whose pictures are made here, by their names under docs."""
    own = [PAGE, *sorted((DOCS / "guidance").glob("*.md")), *sorted((DOCS / "recipes").glob("*.md"))]
    return {page.relative_to(DOCS).with_suffix("").as_posix(): page for page in own if PICTURE.search(page.read_text())}


def run(words: list[str]) -> None:
    """Run a command, unless it is among those that are done here."""
    from difftune.cli.program import cli

    line = shlex.join(words)
    if not DONE.exists() or line not in DONE.read_text().splitlines():
        print("difftune", line, flush=True)
        shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
        cli.main(words, prog_name="difftune")
        with DONE.open("a") as done:
            done.write(f"{line}\n")


def picture(source: str) -> Image.Image:
    """What a comment's right side names: a picture, the curves of a report, or several pictures under their names."""
    if ": " in source:
        named = [part.split(": ") for part in source.split(", ")]
        return beside([(name, picture(file)) for name, file in named])
    if source.endswith(".html"):
        return Image.open(io.BytesIO(base64.b64decode(CURVES.search(Path(source).read_text())[1])))  # type: ignore[index]
    found = Image.open(source).convert("RGB")
    factor = max(1, round(480 / max(found.size)))
    return found.resize((factor * found.width, factor * found.height), Image.Resampling.NEAREST)


def beside(named: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures side by side, each under its name."""
    from difftune.reports.sheets import INK, font

    width, height = named[0][1].size
    made = Image.new("RGB", (len(named) * (width + APART) - APART, height + LINE), "white")
    for i, (name, each) in enumerate(named):
        ImageDraw.Draw(made).text((i * (width + APART), LINE // 2), name, INK, font(18), anchor="lm")
        made.paste(each, (i * (width + APART), LINE))
    return made


def strip() -> Image.Image:
    """The groups side by side: a title, a label for each column, and two pictures below it."""
    from difftune.reports.sheets import FAINT, INK, font

    columns = sum(len(group) for _, group in GROUPS)
    width = columns * (SIDE + GAP) - GAP * len(GROUPS) + APART * (len(GROUPS) - 1) + 2 * GAP
    made = Image.new("RGB", (width, 2 * LINE + 2 * (SIDE + GAP) + GAP), "white")
    pen, x = ImageDraw.Draw(made), GAP
    for title, group in GROUPS:
        pen.text((x, LINE // 2 + 2), title, INK, font(17, bold=True), anchor="lm")
        for label, files in group:
            pen.text((x, LINE + LINE // 2), label, FAINT, font(16), anchor="lm")
            for i in range(2):
                large = (
                    Image.open(files.format(i=i, j=i + 4, k=i + 2))
                    .convert("RGB")
                    .resize((SIDE, SIDE), Image.Resampling.NEAREST)
                )
                made.paste(large, (x, 2 * LINE + i * (SIDE + GAP)))
            x += SIDE + GAP
        x += APART - GAP
    return made


def save(image: Image.Image, file: Path) -> None:
    """As PNG of 256 colours, which is a third of the size and looks the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(file.relative_to(ROOT), f"{file.stat().st_size / 1000:.0f} kB", flush=True)


def make_pictures(page: Path) -> None:
    """Run a page's commands, and put its pictures in their places."""
    text = page.read_text()
    for words in commands(drawn(text)):
        run(words)
    for target, source in PICTURE.findall(text):
        save(picture(source), (page.parent / target).resolve())


def main() -> None:
    known = pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help=f"all without them: {', '.join(known)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gallery", help="where the commands run")
    given = parser.parse_args()
    if unknown := set(given.pages) - set(known):
        parser.error(f"no page with pictures of that name: {', '.join(sorted(unknown))}")
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    for name in given.pages or known:
        make_pictures(known[name])
    if "gallery" in (given.pages or known):
        save(strip(), STRIP)


if __name__ == "__main__":
    main()
