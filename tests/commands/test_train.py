"""``trellis train``: what it writes and says, and what it leaves when it is stopped, fails or goes on."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import signal
import subprocess
import sys

import pandas as pd
import pytest
from rich.console import Console

import trellis_ts.checkpoints
import trellis_ts.lightning
import trellis_ts.training
from trellis_ts.commands.console import Terminal
from trellis_ts.commands.progress import TrainingProgress


def log_of(model):
    with (model / "training" / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_a_table_to_a_forecast(trellis, folder, wide, tiny):
    result = trellis("train", "wide.csv", *tiny)
    first, *reasons, epoch = result.err.splitlines()
    assert reasons == [
        "found a season of 24 steps (autocorrelation 0.98)",
        "balanced: at most 1 epoch of all 67 windows, 8 per step, learning rate 0.0003, at most 5m",
        "values are read and forecast through asinh: nothing grows so fast that it would be bent",
    ]
    assert first == (
        "wide.csv: 1 series, 2 channels, every h; the model reads 24 steps of h as 4 patches of 6, predicts 6; "
        "season of 24; calendar of day"
    )
    assert epoch.startswith("epoch 1/1: train ")
    lines = result.out.splitlines()
    assert lines[0].startswith("trained 1 epoch in ")
    assert lines[-1] == "saved to models/wide; next: trellis evaluate models/wide wide.csv"
    model = folder / "models" / "wide"
    assert sorted(each.name for each in model.iterdir()) == [
        "calibration.json",
        "config.json",
        "data.json",
        "model.safetensors",
        "training",
    ]
    assert [row["epoch"] for row in log_of(model)] == ["1"]
    assert list((model / "training").glob("tensorboard/events.out.tfevents.*"))
    assert trellis("evaluate", "models/wide", "wide.csv").out.startswith("7 windows of 6 steps")
    trellis("forecast", "models/wide", "wide.csv", "-o", "out.csv", "--plot", "out.png")
    assert len(pd.read_csv("out.csv")) == 12


def test_lengths_are_chosen_from_the_data(trellis, long):
    small = ("--width", "8", "--num-layers", "1", "--max-epochs", "1")
    data = trellis("train", "long.csv", *small, "--json").data
    assert data["shape"]["season_length"] == 7
    assert data["shape"]["prediction_length"] == 14
    trellis("forecast", "models/long", "long.csv")


def test_json_and_quiet(trellis, wide, tiny):
    result = trellis("train", "wide.csv", "-o", "m", "--json", "--quiet", *tiny)
    assert result.err == ""
    assert set(result.data) == {
        *("model", "stop_reason", "num_epochs", "best_epoch", "validation_loss", "seconds", "num_parameters"),
        *("train_windows", "validation_windows", "left_out_series", "left_out_steps", "shape", "reasons"),
    }
    assert (result.data["model"], result.data["stop_reason"], result.data["num_epochs"]) == ("m", "epochs", 1)
    assert trellis("train", "wide.csv", "-o", "n", "--quiet", *tiny).err == ""


@pytest.mark.parametrize("options", [["--loss", "mae"], ["--num-workers", "1"], ["--precision", "bf16-mixed"]])
def test_other_ways_to_train(trellis, wide, tiny, options):
    trellis("train", "wide.csv", "-o", "m", *tiny, *options)
    result = trellis("forecast", "m", "wide.csv")
    if "--loss" in options:
        assert result.out.splitlines()[0] == "unique_id,ds,forecast"
        assert "gives points only; --quantile-levels 0.1,0.9 adds calibrated bands" in result.err
        bands = trellis("forecast", "m", "wide.csv", "--quantile-levels", "0.1,0.9")
        assert bands.out.splitlines()[0] == "unique_id,ds,forecast,q0.1,q0.9"
        assert bands.err == ""
        plain = trellis("forecast", "m", "wide.csv", "--no-calibration")
        assert "gives points only; --loss quantile gives bands" in plain.err


def test_without_levels_the_bands_reach_95_percent(trellis, wide, tiny):
    trellis("train", "wide.csv", "-o", "m", *tiny[: tiny.index("--quantile-levels")], *tiny[-6:])
    header = trellis("forecast", "m", "wide.csv").out.splitlines()[0]
    assert header == "unique_id,ds,forecast,q0.025,q0.05,q0.1,q0.25,q0.5,q0.75,q0.9,q0.95,q0.975"


@pytest.mark.parametrize("loss", ["normal", "student_t"])
def test_distributions(trellis, wide, tiny, loss):
    trellis("train", "wide.csv", "-o", "m", *tiny, "--loss", loss)
    found = pd.read_csv(io.StringIO(trellis("forecast", "m", "wide.csv", "--quantile-levels", "0.01", "0.99").out))
    assert list(found) == ["unique_id", "ds", "forecast", "q0.01", "q0.99"]
    assert (found["q0.01"] < found["forecast"]).all()
    assert (found["forecast"] < found["q0.99"]).all()


def test_counts(trellis, refused, folder, wide, tiny):
    frame = pd.read_csv(wide)
    frame[["load", "heat"]] = frame[["load", "heat"]].round()
    frame.to_csv("counts.csv", index=False)
    trellis("train", "counts.csv", "-o", "m", *tiny, "--loss", "negative_binomial")
    found = pd.read_csv(io.StringIO(trellis("forecast", "m", "counts.csv").out))
    assert (found["q0.9"] == found["q0.9"].round()).all()
    frame.loc[7, "heat"] += 0.25
    frame.to_csv("halves.csv", index=False)
    line = refused("train", "halves.csv", "-o", "n", *tiny, "--loss", "negative_binomial")
    assert "--loss negative_binomial takes counts, but column 'heat' holds " in line
    assert ".25 at 2024-01-01T07:00:00 (row 8 of the series" in line


def test_the_same_seed_gives_the_same_model(trellis, folder, wide, wide_model, tiny):
    trellis("train", "wide.csv", "-o", "same", *tiny, "--seed", "0")
    trellis("train", "wide.csv", "-o", "other", *tiny, "--seed", "1")
    weights = [(each / "model.safetensors").read_bytes() for each in (wide_model, folder / "same", folder / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_a_time_limit(trellis, wide, tiny):
    result = trellis("train", "wide.csv", "-o", "m", *tiny, "--max-epochs", "100000", "--max-time", "0.5s")
    assert "(time is up)" in result.out


def test_what_exists_is_not_written_over(trellis, refused, folder, wide, tiny):
    trellis("train", "wide.csv", "-o", "m", *tiny)
    (folder / "m" / "notes.txt").write_text("mine")
    line = refused("train", "wide.csv", "-o", "m", *tiny)
    assert "m exists; choose another --output, go on with --resume, or replace it with --overwrite" in line
    before = (folder / "m" / "model.safetensors").read_bytes()
    trellis("train", "wide.csv", "-o", "m", *tiny, "--seed", "3", "--overwrite")
    assert (folder / "m" / "model.safetensors").read_bytes() != before
    assert (folder / "m" / "notes.txt").read_text() == "mine"
    (folder / "empty").mkdir()
    trellis("train", "wide.csv", "-o", "empty", *tiny)


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("home", "home exists and holds other files than a model's; choose another --output"),
        (".", "holds other files than a model's"),
        ("wide.csv", "cannot write wide.csv: wide.csv is a file; name a directory"),
        ("wide.csv/m", "wide.csv is a file; name a directory"),
    ],
)
def test_what_is_no_model_is_never_replaced(refused, folder, wide, tiny, output, expected, option):
    (folder / "home").mkdir()
    (folder / "home" / "thesis.tex").write_text("years of work")
    assert expected in refused("train", "wide.csv", "-o", output, *tiny, *option)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_training(trellis, refused, folder, wide, tiny, monkeypatch):
    monkeypatch.setattr(trellis_ts.training._Reports, "_write", full)
    result = trellis("train", "wide.csv", "-o", "deep/er/m", *tiny, code=2)
    assert result.err.splitlines()[-1] == (
        "trellis train: error: cannot write deep/er/m: the disk is full; make room or choose another --output"
    )
    assert [each.name for each in folder.iterdir()] == ["wide.csv"]


def test_a_full_disk_while_saving(trellis, folder, wide, tiny, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(trellis_ts.checkpoints, "save_file", full)
        result = trellis("train", "wide.csv", "-o", "m", *tiny, code=2)
    assert result.err.splitlines()[-1] == (
        "trellis train: error: cannot save the model to m: the disk is full; make room, then save it with --resume"
    )
    # What was trained is kept, and nothing looks like a model.
    assert [each.name for each in (folder / "m").iterdir()] == ["training"]
    assert sorted(each.name for each in folder.iterdir()) == ["m", "wide.csv"]
    result = trellis("train", "wide.csv", "-o", "m", "--resume")
    assert "trained 1 epoch in" in result.out
    trellis("forecast", "m", "wide.csv")


def test_an_old_model_survives_a_new_one_that_fails(trellis, folder, wide, tiny, monkeypatch):
    trellis("train", "wide.csv", "-o", "m", *tiny)
    before = {each.name: each.read_bytes() for each in (folder / "m").iterdir() if each.is_file()}
    monkeypatch.setattr(trellis_ts.checkpoints, "save_file", full)
    trellis("train", "wide.csv", "-o", "m", *tiny, "--seed", "1", "--overwrite", code=2)
    assert {each.name: each.read_bytes() for each in (folder / "m").iterdir() if each.is_file()} == before


def test_not_enough_memory(refused, wide):
    line = refused("train", "wide.csv", "--width", "1048576", "--quiet")
    assert "not enough memory; try a smaller --batch-size, --width or --context-length" in line


def test_training_that_diverges(trellis, folder, wide, tiny):
    line = trellis("train", "wide.csv", "-o", "m", *tiny, "--learning-rate", "1e30", "--max-epochs", "3", code=2).err
    assert "lower --learning-rate" in line.splitlines()[-1]


def test_more_epochs_after_the_last(trellis, folder, wide, tiny):
    options = (*tiny, "--max-epochs", "4", "--patience", "1000")
    trellis("train", "wide.csv", "-o", "m", *options)
    result = trellis("train", "wide.csv", "-o", "m", "--resume", "--max-epochs", "6")
    assert [line.split(":")[0] for line in result.err.splitlines()[1:]] == ["epoch 5/6", "epoch 6/6"]
    assert "trained 6 epochs" in result.out
    assert [row["epoch"] for row in log_of(folder / "m")] == ["1", "2", "3", "4", "5", "6"]
    assert "trained 6 epochs" in trellis("train", "wide.csv", "-o", "m", "--resume").out


def test_more_patience_after_it_ran_out(trellis, folder, wide, tiny, monkeypatch):
    losses = iter([0.5, 0.6, 0.7, 0.4, 0.3])
    monkeypatch.setattr(
        trellis_ts.lightning.ForecastModule,
        "validation_step",
        lambda self, batch, index: self.log(
            "validation_loss", self._loss(self.kept_model, batch) * 0 + next(losses), batch_size=1
        ),
    )
    options = (*tiny, "--initial-skip", "zero", "--max-epochs", "5", "--patience", "1")
    assert "no better validation loss" in trellis("train", "wide.csv", "-o", "m", *options).out
    assert len(log_of(folder / "m")) == 2
    result = trellis("train", "wide.csv", "-o", "m", "--resume", "--patience", "9")
    assert "trained 5 epochs" in result.out
    assert "(all epochs done)" in result.out
    assert "best epoch 5: validation loss 0.3000" in result.out


def test_what_cannot_be_resumed(trellis, refused, folder, make_wide, wide, tiny):
    assert "nothing to resume: m/training/run.yaml does not exist" in refused(
        "train", "wide.csv", "-o", "m", "--resume"
    )
    trellis("train", "wide.csv", "-o", "m", *tiny)
    again = ("train", "wide.csv", "-o", "m", "--resume")
    assert "--resume cannot change width from 8 to 16; train anew with another --output" in refused(
        *again, "--width", "16"
    )
    assert "cannot change seed from 0 to 1" in refused(*again, "--seed", "1")
    assert "cannot change target from None to ['load']" in refused(*again, "--target", "load")
    make_wide(130).to_csv("wide.csv", index=False)
    result = trellis(*again, code=2)
    assert "--resume cannot change the data: wide.csv is not what the run began with" in result.err.splitlines()[-1]
    make_wide().to_csv("wide.csv", index=False)
    state = folder / "m" / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:5000])
    assert "state.safetensors is damaged and cannot be resumed from" in trellis(*again, code=2).err.splitlines()[-1]
    (folder / "m" / "training" / "run.yaml").write_text("width: [8\n")
    assert "run.yaml" in refused(*again)


def run_and_stop(arguments, signals):
    """Runs ``trellis``; each signal is sent once standard error has a line with its text. Gives code, out and err."""
    command = [sys.executable, "-m", "trellis_ts", *arguments]
    with (
        open("out.txt", "w+") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as process,
    ):
        lines = []
        for line in process.stderr:
            lines.append(line)
            if signals and signals[0][0] in line:
                process.send_signal(signals.pop(0)[1])
        code = process.wait(timeout=60)
        out.seek(0)
        return code, out.read(), "".join(lines)


def test_interrupts_keep_the_best_model_and_training_goes_on(trellis, folder, wide, tiny):
    options = ("-o", "m", *tiny, "--max-epochs", "14", "--patience", "1000", "--initial-skip", "zero")
    code, out, err = run_and_stop(["train", "wide.csv", *options], [("epoch 2/14", signal.SIGINT)])
    assert (code, "Traceback" in err) == (0, False), err
    assert "stopping after this step; the best model is kept" in err
    assert "(interrupted; go on with --resume)" in out
    trellis("forecast", "m", "wide.csv")
    done = len(log_of(folder / "m"))
    assert 2 <= done < 14

    resumed = ["train", "wide.csv", "-o", "m", "--resume"]
    code, out, err = run_and_stop(resumed, [(f"epoch {done + 2}/14", signal.SIGTERM)])
    assert (code, "Traceback" in err) == (0, False), err
    assert "(interrupted; go on with --resume)" in out

    result = trellis("train", "wide.csv", "-o", "m", "--resume")
    assert "trained 14 epochs" in result.out
    assert "(all epochs done)" in result.out
    assert [row["epoch"] for row in log_of(folder / "m")] == [str(epoch) for epoch in range(1, 15)]
    losses = [float(row["validation_loss"]) for row in log_of(folder / "m")]
    assert f"best epoch {losses.index(min(losses)) + 1}:" in result.out


def test_a_second_interrupt_gives_up(trellis, folder, wide, tiny, monkeypatch):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "stepped", twice)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    result = trellis("train", "wide.csv", "-o", "m", *tiny, code=130)
    assert result.err.splitlines()[-1] == "trellis train: interrupted"
    assert "stopping after this step" in result.err
    assert [each.name for each in folder.iterdir()] == ["wide.csv"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_bar_on_a_terminal(trellis, wide, tiny, monkeypatch):
    """On a terminal there is one bar, which stays within the width; lines are for files and pipes."""
    screen = io.StringIO()

    def on_a_terminal(self, *, quiet, as_json):
        self.quiet, self.as_json = quiet, as_json
        self.err = Console(file=screen, force_terminal=True, width=80, height=30, highlight=False)

    monkeypatch.setattr(Terminal, "__init__", on_a_terminal)
    result = trellis("train", "wide.csv", "-o", "m", *tiny, "--max-epochs", "2", "--max-time", "1h")
    assert "saved to m" in result.out
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", text)
    bars = [line for line in re.split(r"[\r\n]+", text) if "━" in line]
    assert bars
    assert any("loss 0." in line and "best 0." in line for line in bars)
    assert max(map(len, bars)) < 80
    assert "epoch 1/2: train" not in text


def test_from_a_model_to_another(trellis, refused, folder, wide, make_wide, tiny):
    trellis("train", "wide.csv", "-o", "old", *tiny, "--loss", "mae")
    make_wide(140, start="2024-03-01").to_csv("new.csv", index=False)
    options = ("train", "new.csv", "-o", "new", "--from", "old")
    assert "width=16 is not the 8 of the model to start from" in refused(*options, "--width", "16")
    assert "no model at nowhere" in refused("train", "new.csv", "-o", "new", "--from", "nowhere")
    trellis(*options, "--max-epochs", "2")
    info = trellis("info", "new", "--json").data
    assert (info["settings"]["width"], info["settings"]["loss"], info["shape"]["context_length"]) == (8, "mae", 24)
    result = trellis("train", "new.csv", "-o", "new", "--resume", "--max-epochs", "3")
    assert "trained 3 epochs" in result.out
    assert "leave out --from" in refused(*options, "--resume")
    make_wide(140).rename(columns={"heat": "warmth"}).to_csv("other.csv", index=False)
    line = refused("train", "other.csv", "-o", "third", "--from", "old")
    assert "heat" in line
