"""Every method has its page, and the page names its settings and defaults."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from guidance.methods.catalogue import GUIDANCE
from scripts import make_family_lines

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", GUIDANCE)
def test_page(name):
    page, overview = (DOCS / "guidance" / f"{name}.md").read_text(), (DOCS / "guidance.md").read_text()
    assert page.startswith(f"# {name}: ") and f"(guidance/{name}.md)" in overview
    kind = GUIDANCE[name].__name__
    assert f"`{kind}`" in page and f"`{kind}`" in overview
    if name != "null-text":  # Python alone
        commands = [part.partition("```")[0] for part in page.split("```bash\n")[1:]]
        assert any("--guidance" in command and name in command for command in commands), "no command"
    if name in ("none", "null-text"):
        return
    for field in fields(GUIDANCE[name]):
        assert f"`{field.name}`" in page, field.name
        if isinstance(field.default, float) and field.default is not MISSING:
            assert f"{field.default:g}" in page, (field.name, field.default)


def test_each_page_says_its_families():
    for page, line in make_family_lines.lines().items():
        text = (DOCS / f"{page}.md").read_text()
        assert f"\n{line}\n" in text, f"{page}: run python scripts/make_family_lines.py"
        assert len(make_family_lines.LINE.findall(text)) == 1 and "families/table.py" not in text, page


def test_a_line_says_what_is_refused_and_what_is_not_tested():
    line = make_family_lines.line(
        "guidance/nasa", ["sd", "sdxl"], {"flux": "no patch 'nasa'", "sd3": "no patch 'nasa'"}
    )
    assert line.startswith("**Families.** Trained models: sd (`tiny`). Small random checkpoints: sdxl. Refused: ")
    assert "Refused: sd3, flux (no patch 'nasa'). Not tested: flux2, " in line
    reason = make_family_lines.reason
    assert reason("PAG does not go here: family wan has no patch 'pag'; known: (slg)") == "no patch 'pag'"
    assert reason("CFGpp has no guided prediction: take another method") == "CFGpp has no guided prediction"
