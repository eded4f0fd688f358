"""The curves of a training: what is drawn is what was run last."""

import json
import sys

from scripts import plot_curves


def test_a_step_that_ran_twice_is_drawn_as_it_came_out_last(tmp_path, monkeypatch):
    points = [("vae", 50, 1.0), ("tiny", 50, 0.5), ("tiny", 100, 0.4), ("tiny", 50, 0.3)]
    lines = [json.dumps(dict(zip(("stage", "step", "loss"), point, strict=True))) for point in points]
    (tmp_path / "curves.jsonl").write_text("\n".join(lines))
    stages = plot_curves.curves(tmp_path)
    assert stages == {"vae": {50: 1.0}, "tiny": {50: 0.3, 100: 0.4}}
    vae, tiny, empty = plot_curves.drawn(stages).axes
    assert list(tiny.lines[0].get_ydata()) == [0.3, 0.4] and not empty.axison and vae.get_title() == "vae"
    monkeypatch.setattr(sys, "argv", ["plot_curves", str(tmp_path), "--out", str(tmp_path / "made.svg")])
    plot_curves.main()
    assert all(f">{stage}<" in (tmp_path / "made.svg").read_text() for stage in stages)
