"""The documentation site builds offline, without a broken link, and loads nothing from elsewhere."""

import os
import re
import shlex
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import difftune
from scripts.site_hooks import BESIDE
from tests.support.browsers import check_widths

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\" >]+)|<link\b[^>]*\bhref=\"?([^\" >]+)|url\(([^)]+)\)|@import +([^;]+)"
)


BUILD = shlex.split(re.search(r"/mkdocs (build .+)", (ROOT / "Makefile").read_text())[1])  # as `make docs` does


def build(folder, *flags):
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", *BUILD, "--site-dir", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; what `make docs` calls must end well."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def served(site):
    """The address of the site: its search, a worker, is not loaded from a file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


NOWHERE = ("[a](nowhere.md)", "[a](folder/)", "[a](#nowhere)", "[a](other.md#nowhere)", "[a](/other.md)")


@pytest.mark.slow
@pytest.mark.parametrize("link", ["[a](other.md#here)", *NOWHERE])
def test_a_link_to_nowhere_fails(tmp_path, link):
    """By our own settings of what counts, on two pages."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# First\n\n{link}\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## Here\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT}/mkdocs.yml\ndocs_dir: docs\ntheme: mkdocs\nextra_css: []\nhooks: []\nplugins: []\n"
        "markdown_extensions: []\nnav: [index.md, other.md]\n"
    )
    done = build(tmp_path / "site", "--config-file", str(config))
    assert bool(done.returncode) == (link in NOWHERE), done.stdout + done.stderr


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    loaded = {"".join(groups).strip("'\"") for file in files for groups in LOADED.findall(file.read_text())}
    assert any(where.endswith(".css") for where in loaded)  # the pattern finds something
    assert not [where for where in loaded if re.match(r"(https?:)?//", where)]


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    found = {
        name for identifier in re.findall(r'id="([\w.]+)"', text) for name in (identifier, identifier.rsplit(".")[-1])
    }
    homes = {name: home.partition(":")[2] or name for name, home in difftune._HOME.items()}
    missing = {
        name for name, own in homes.items() if own not in found and difftune._HOME[name].rstrip(":") not in found
    }
    missing |= {name for _, places in BESIDE.values() for own in places.values() for name in own} - found
    assert not missing


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    "page", ["index", "choose", "gallery", "benchmarks", "guidance/pag", "recipes/grpo", "api/guidance"]
)
def test_a_page_is_no_wider_than_its_window(served, page, browser):
    check_widths(browser, f"{served}/{page}.html")
