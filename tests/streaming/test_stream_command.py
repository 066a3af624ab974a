"""``trellis stream``: lines in, forecasts out, bad lines named, and the state kept whatever happens."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trellis_ts.__main__ import main
from trellis_ts.checkpoints import save_checkpoint

START = np.datetime64("2024-03-01T05", "s")


@pytest.fixture(scope="module")
def model(make_live, tmp_path_factory):
    live = make_live(channels=2, calibrated=True)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "live", live.checkpoint, package_version="0")


@pytest.fixture(scope="module")
def rows(make_values):
    return make_values(60, missing=0.0)


def csv_of(rows, name="a"):
    lines = [f"{name},{START + np.timedelta64(i, 'h')},{row[0]:.6f},{row[1]:.6f}" for i, row in enumerate(rows)]
    return ["id,ds,y0,y1", *lines]


@pytest.fixture
def stream(model, monkeypatch, capsys):
    """Runs the command on a text in this process; forecasts, standard error."""

    def run(text, *arguments, code=0):
        content = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["stream", str(model), *map(str, arguments)])
        captured = capsys.readouterr()
        assert exit_.value.code == code, captured.err
        return [json.loads(line) for line in captured.out.splitlines()], captured.err

    return run


def test_a_forecast_for_every_line_as_the_library_gives_it(stream, make_live, rows):
    found, err = stream("\n".join(csv_of(rows)))
    live = make_live(channels=2, calibrated=True)
    assert len(found) == len(rows)
    for line, (index, row) in zip(found, enumerate(rows), strict=True):
        live.update([row], START + np.timedelta64(index, "h"), series="a")
        forecast = live.forecast("a")
        assert line["id"] == "a"
        assert line["ds"] == str(START + np.timedelta64(index, "h"))
        if index < 7:
            assert line["y0"]["forecast"] == [None] * 5
            continue
        np.testing.assert_allclose(line["y1"]["forecast"], forecast.point[0, :, 1], rtol=1e-3)
        np.testing.assert_allclose(line["y0"]["q0.9"], forecast.quantiles[0, :, 0, 4], rtol=1e-3)
    assert err == "note: 60 updates, 0 lines skipped, 0 late\n"


def test_json_lines_say_the_same_as_csv(stream, rows):
    lines = [
        json.dumps({"id": "a", "ds": str(START + np.timedelta64(i, "h")), "y0": round(r[0], 6), "y1": round(r[1], 6)})
        for i, r in enumerate(rows)
    ]
    assert stream("\n".join(lines))[0] == stream("\n".join(csv_of(rows)))[0]


def test_options_choose_what_is_printed(stream, rows):
    found, _ = stream("\n".join(csv_of(rows)), "--every", 20, "--steps", 2, "--quantile-levels", "0.3", "--drift")
    assert [set(line) for line in found] == [{"id", "ds", "y0", "y1"}] * 3
    assert set(found[0]["y0"]) == {"forecast", "q0.3", "drift"}
    assert len(found[0]["y0"]["forecast"]) == 2
    assert set(found[2]["y1"]["drift"]) == {"forget_gate", "surprise", "error"}


BAD = {
    "a,2024-03-02T05:00,1": "3 cells instead of 4",
    "a,2024-03-02T05:00,1,x": "y1 is 'x', which is no number",
    "a,2024-03-02T05:00,1,inf": "which is no number",
    "a,second of March,1,2": "'second of March' is not a date",
    "a,2024-03-02T05:30:00,1,2": "is not on the calendar",
    ",2024-03-02T05:00,1,2": "id is empty",
    'a,"2024-03-02T05:00,1,2': "the quotes do not close",
    b"a,2024-03-02T05:00,\xff\xfe,2": "no UTF-8",
    b"a," + b"9" * (1 << 20): "longer than 1,048,576 bytes",
}


def test_bad_lines_are_named_and_skipped(stream, rows):
    lines = [line.encode() for line in csv_of(rows)]
    good, _ = stream(b"\n".join(lines))
    bad = [each if isinstance(each, bytes) else each.encode() for each in BAD]
    mixed = [*lines[:30], *bad, b"", *lines[30:], b"a,2024-03-01T05:00,1,2"]
    found, err = stream(b"\n".join(mixed))
    assert found == good
    for words in BAD.values():
        assert words in err
    assert "line 31: 3 cells instead of 4; skipped" in err
    assert "60 updates" in err
    assert "1 late" in err


@pytest.mark.parametrize("bad", list(BAD), ids=range(len(BAD)))
def test_strict_stops_at_a_bad_line(stream, rows, bad):
    bad_line = bad if isinstance(bad, bytes) else bad.encode()
    text = b"\n".join([*(line.encode() for line in csv_of(rows[:10])), bad_line, b"a,2024-03-01T15:00,1,2"])
    found, err = stream(text, "--strict", code=2)
    assert len(found) == 10
    assert err.startswith("trellis stream: error: line 12: ") or "line 12: " in err
    assert BAD[bad] in err


def test_a_header_without_a_channel_is_refused(stream):
    _, err = stream("id,ds,y0\n", code=2)
    assert "line 1: the first line has no column 'y1'" in err


def test_it_goes_on_where_it_stopped(stream, rows, tmp_path):
    whole, _ = stream("\n".join(csv_of(rows)))
    lines = csv_of(rows)
    state = tmp_path / "live.state"
    first, _ = stream("\n".join(lines[:25]), "--state", state)
    # The same lines once more are late; those after them are not.
    rest, err = stream("\n".join(lines), "--state", state)
    assert first + rest == whole
    assert "36 updates, 0 lines skipped, 24 late" in err


def test_the_state_of_another_model_is_refused(stream, make_live, rows, tmp_path):
    other = make_live(channels=2, seed=5)
    other.update(rows[:20])
    other.snapshot(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    _, err = stream("\n".join(csv_of(rows)), "--state", tmp_path / "state", code=2)
    assert "written by another model" in err
    assert (tmp_path / "state").read_bytes() == before


def spawn(model, *arguments, **options):
    command = [sys.executable, "-P", "-m", "trellis_ts", "stream", str(model), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


def test_sigterm_while_waiting_saves_the_state_and_follow_goes_on(model, rows, tmp_path):
    table, state = tmp_path / "live.csv", tmp_path / "state"
    lines = csv_of(rows)
    table.write_text("\n".join(lines[:21]) + "\n" + lines[21][:9])  # the last line is not whole yet
    with spawn(model, "--follow", table, "--state", state) as process:
        first = [json.loads(process.stdout.readline()) for _ in range(20)]
        with table.open("a") as file:
            file.write(lines[21][9:] + "\n")
        first.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGTERM)
        rest, err = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, b"")
    assert b"stopped by SIGTERM" in err
    with table.open("a") as file:
        file.write("\n".join(lines[22:]) + "\n")
    with spawn(model, "--follow", table, "--state", state) as process:
        second = [json.loads(process.stdout.readline()) for _ in range(len(rows) - 21)]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert b"0 late" in err  # it did not read what it had read before
    assert [line["ds"] for line in first + second] == [line.split(",")[1] for line in lines[1:]]


def test_a_reader_that_leaves_ends_it_and_the_state_is_kept(model, rows, tmp_path):
    state = tmp_path / "state"
    with spawn(model, "--state", state, stdin=subprocess.PIPE) as process:
        process.stdin.write("\n".join(csv_of(rows)[:11]).encode() + b"\n")
        process.stdin.flush()
        for _ in range(10):
            process.stdout.readline()
        process.stdout.close()
        process.stdin.write("\n".join(csv_of(rows)[11:]).encode() + b"\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        assert b"Traceback" not in process.stderr.read()
    assert state.stat().st_size > 0


def test_it_takes_no_more_than_it_can_use(model, rows):
    """A writer is held up by a reader that does not read: nothing is gathered in between."""
    pattern = ("\n".join(csv_of(rows)[1:]) + "\n").encode()
    with spawn(model, stdin=subprocess.PIPE) as process:
        process.stdin.write(b"id,ds,y0,y1\n" + pattern)
        process.stdin.flush()
        process.stdout.readline()
        os.set_blocking(process.stdin.fileno(), False)
        written, quiet_since = 0, time.monotonic()
        line = b"b,,1.5,2.5\n" * 50
        while time.monotonic() - quiet_since < 3 and written < 50_000_000:
            try:
                written += os.write(process.stdin.fileno(), line)
                quiet_since = time.monotonic()
            except BlockingIOError:
                time.sleep(0.05)
        assert written < 2_000_000  # the pipes' and one reader's buffers
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=60) == 0


def test_forecasts_go_on_when_nobody_reads_the_notes(model, rows):
    """A note that cannot be written ends nothing and takes no forecast along."""
    lines = csv_of(rows)
    lines.insert(3, "this,is,no,line")
    with spawn(model, stdin=subprocess.PIPE) as process:
        process.stderr.close()
        process.stdin.write(("\n".join(lines) + "\n").encode())
        process.stdin.close()
        assert len(process.stdout.read().splitlines()) == len(rows)
        assert process.wait(timeout=60) == 0


def killed(model, rows, tmp_path, kills, seed):
    table = tmp_path / "table.csv"
    table.write_text("\n".join(line.partition(",")[2] for line in csv_of(rows)) + "\n")
    program = Path(__file__).with_name("kill_and_restart.py")
    done = subprocess.run(
        [sys.executable, "-P", program, model, table, tmp_path / "state", str(kills), str(seed)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wide_model(make_checkpoint, as_panel, make_values, tmp_path_factory):
    """A model of a wide table, whose series has no name."""
    from dataclasses import replace

    panel = as_panel(make_values(60), name="")
    panel = replace(panel, columns=replace(panel.columns, id=None))
    sizes = {"mode": "streaming", "patch_length": 4, "patch_stride": 4, "context_length": 14, "prediction_length": 5}
    checkpoint = make_checkpoint(panel, num_slots=8, width=16, num_layers=2, **sizes)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "wide", checkpoint, package_version="0")


def test_killed_at_any_moment_it_is_left_with_a_whole_state(wide_model, make_values, tmp_path):
    found = killed(wide_model, make_values(400, missing=0.0), tmp_path, kills=8, seed=1)
    assert len(found) == 8
    assert max(found) > 20


@pytest.mark.slow
def test_killed_a_hundred_times(wide_model, make_values, tmp_path):
    found = killed(wide_model, make_values(2000, missing=0.0), tmp_path, kills=100, seed=2)
    assert len(found) == 100
    assert len(set(found)) > 30
