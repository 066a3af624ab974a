"""``trellis export`` and ``trellis explain``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trellis_ts.__main__ import main

GOLDEN = Path(__file__).parents[1] / "golden"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def test_explain_draws_and_tells(capsys, tmp_path):
    picture = tmp_path / "explain.png"
    code, out, err = run(capsys, "explain", GOLDEN / "model", GOLDEN / "input.csv", "-o", picture)
    assert code == 0, err
    assert "mean change of the forecast without" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "explain", GOLDEN / "model", GOLDEN / "input.csv", "--json")
    assert code == 0
    found = json.loads(out)
    assert len(found["importance"]) == len(found["series"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", GOLDEN / "model", GOLDEN / "input.csv", "--series", "nobody"], "there is none of this name"),
        (["explain", GOLDEN / "model", GOLDEN / "input.csv", "-o", "x.txt"], "unknown ending"),
        (["export", GOLDEN / "model", "-o", "model.pkl"], "unknown ending; use .onnx or .pt2"),
        (["export", GOLDEN / "nothing", "-o", "model.pt2"], "no model at"),
    ],
)
def test_bad_requests_are_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_export_writes_a_program(capsys, tmp_path):
    code, out, err = run(capsys, "export", GOLDEN / "model", "-o", tmp_path / "model.pt2", "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] == (tmp_path / "model.pt2").stat().st_size > 1000
