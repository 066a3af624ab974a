"""The tour is true: its snippets run from top to bottom, Python and console alike."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trellis_ts.__main__ import main

pytest.importorskip("sktime", reason="needs the extra sktime")

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour.md"
SNIPPETS = re.findall(r"^```(python|console)\n(.*?)^```", TOUR.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_every_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    commands = 0
    for language, text in SNIPPETS:
        if language == "python":
            exec(compile(text, str(TOUR), "exec"), names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "trellis"
            with pytest.raises(SystemExit) as exit_info:
                main(arguments)
            assert exit_info.value.code == 0, f"{line}: {capsys.readouterr().err}"
            commands += 1
    assert commands == 5
    assert {"forecast.csv", "forecast.png", "explain.png", "sales.pt2"} <= {each.name for each in tmp_path.iterdir()}
    assert len(names["next_week"]) == 7


def test_the_pages_it_leads_to_are_there():
    for link in re.findall(r"\]\(([\w-]+\.md)", TOUR.read_text(encoding="utf-8")):
        assert (TOUR.parent / link).is_file(), link
