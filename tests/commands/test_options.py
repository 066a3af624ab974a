"""Options and configuration files that cannot be used, and those that can."""

from __future__ import annotations

import pytest
import yaml

from trellis_ts.commands.configuration import packaged_configs


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--predicton-length", "3"], "unknown option --predicton-length; did you mean --prediction-length?"),
        (["--prediction_length=3"], "unknown option --prediction_length; did you mean --prediction-length?"),
        (["--max"], "unknown option --max; did you mean --max-epochs?"),
        (["-x"], "unknown option -x; see trellis train --help"),
        (["extra.csv"], "unexpected argument 'extra.csv'; write trellis train DATA"),
        (["--quiet", "maybe"], "unexpected argument 'maybe'"),
        (["--prediction-length", "0"], "prediction_length=0 must lie between 1 and"),
        (["--prediction-length", "-3"], "prediction_length=-3"),
        (["--prediction-length", "abc"], "--prediction-length: expected a whole number, got 'abc'"),
        (["--prediction-length", "1.5"], "--prediction-length: expected a whole number, got '1.5'"),
        (["--prediction-length"], "--prediction-length needs a value"),
        (["--width", "[1]"], "--width: expected a whole number, got '[1]'"),
        (["--width", "9"], "width=9 is not a multiple of num_heads=4"),
        (["--num-heads", "99999999999"], "num_heads=99999999999 must lie between"),
        (["--learning-rate", "fast"], "--learning-rate: expected a number, got 'fast'"),
        (["--learning-rate", ""], "--learning-rate: expected a number, got ''"),
        (["--learning-rate", "0"], "learning_rate=0.0 must be"),
        (["--dropout", "1"], "dropout=1.0 must lie in [0, 1)"),
        (["--test-size", "1e400"], "test_size=inf"),
        (["--second-order", "maybe"], "--second-order: expected true or false, got 'maybe'"),
        (
            ["--loss", "quantle"],
            "--loss: expected one of quantile, mae, mse, huber, normal, student_t, negative_binomial",
        ),
        (["--precision", "64"], "--precision: expected one of 32, bf16-mixed, 16-mixed, got '64'"),
        (["--quantile-levels", "0.5", "x"], "--quantile-levels: expected a number, got 'x'"),
        (["--quantile-levels", "0.5", "0.1"], "quantile_levels=[0.5, 0.1] must rise"),
        (["--quantile-levels"], "--quantile-levels needs at least one value"),
        (["--target"], "--target needs at least one value"),
        (["--max-time", "120"], "max_time='120' is not a duration; write 90s, 2m or 1.5h"),
        (["--device", "gpu"], "device 'gpu' is unknown; use auto, cpu, cuda, cuda:N or mps"),
        (["--device", "cuda:99"], "use --device cpu"),
        (["--json=3"], "--json takes no value"),
        (["--freq", "fortnight"], "frequency 'fortnight' is not one"),
        (["--freq", "daily"], "did you mean D?"),
        (["--config", "etth"], "did you mean etth"),
        (["--config", "nonsense"], "neither a file nor the name of a configuration"),
        (["--config", "."], "--config .: this is a folder"),
        (["--config"], "--config needs a value"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--resume"], "nothing to resume: models/wide/training/run.yaml does not exist"),
        (["--output", ""], "--output is empty"),
    ],
)
def test_options_of_training_that_cannot_be_used(refused, wide, options, expected):
    assert expected in refused("train", "wide.csv", *options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "DATA is missing; write trellis train DATA"),
        (["train", ""], "no model directory can be named after DATA ''"),
        (["forecast"], "MODEL and DATA are missing; write trellis forecast MODEL DATA"),
        (["forecast", "m"], "DATA is missing"),
        (["evaluate", "m", "d", "--devise", "cpu"], "unknown option --devise; did you mean --device?"),
        (["forecast", "m", "d", "--prediction-length", "x"], "expected a whole number, got 'x'"),
        (["evaluate", "m", "d", "--step", "x"], "--step: expected a whole number, got 'x'"),
        (["info"], "MODEL is missing; write trellis info MODEL"),
        (["info", "m", "--jsn"], "unknown option --jsn; did you mean --json?"),
        (["datasets", "got"], "unknown action 'got'; write `trellis datasets list`"),
        (["datasets", "get"], "which data set?"),
        (["datasets", "list", "etth1"], "write `trellis datasets get etth1`"),
        (["demo", "here"], "unexpected argument 'here'; write trellis demo [-o FOLDER]"),
    ],
)
def test_arguments_that_are_missing_or_wrong(refused, arguments, expected):
    assert expected in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width: 8\nwidht: 3\n", "mine.yaml, line 2: unknown key 'widht'; did you mean width?"),
        ("model:\n  width: 8\n", "line 1: unknown key 'model'"),
        ("width: 8\nwidth: 9\n", "line 2: 'width' is set a second time"),
        ("- 1\n- 2\n", "there are no settings in it"),
        ("hello\n", "there are no settings in it"),
        ("", "there are no settings in it"),
        ("# nothing yet\n", "there are no settings in it"),
        ("width: [1\n", "this is no YAML"),
        ("\tx", "this is no YAML"),
        (b"\xff\xfe\x00", "this is no YAML"),
        ("width: wide\n", "line 1: width must be a whole number, found 'wide'"),
        ("width: 8.0\n", "width must be a whole number, found 8.0"),
        ("width: true\n", "width must be a whole number, found True"),
        ("width:\n", "width has no value"),
        ("dropout: [0.1]\n", "dropout must be a number"),
        ("second_order: 1\n", "second_order must be true or false"),
        ("mixer: trelis\n", "mixer must be one of trellis, attention, gsa, linear, none, found 'trelis'"),
        ("quantile_levels: [0.1, x]\n", "quantile_levels must be a number, found 'x'"),
        ("id: yes\n", "id must be text, found True"),
        ("max_time: 90\n", "max_time='90' is not a duration"),
        ('width: !!python/object/apply:os.system ["touch here"]\n', "line 1: the value cannot be read"),
    ],
)
def test_configuration_files_that_cannot_be_used(refused, folder, wide, text, expected):
    (folder / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refused("train", "wide.csv", "--config", "mine.yaml")


def print_config(trellis, *options):
    return yaml.safe_load(trellis("train", "--print-config", *options).out)


def test_a_printed_configuration_is_read_back_the_same(trellis, folder):
    options = ("--width", "32", "--learning-rate", "1e-4", "--target", "a", "b", "--max-time", "2m", "--id", "007")
    options += ("--linear-skip", "false", "--quantile-levels", "0.2", "0.8", "--time", "Zeit punkt")
    first = trellis("train", "--print-config", *options).out
    values = yaml.safe_load(first)
    assert (values["width"], values["target"], values["linear_skip"]) == (32, ["a", "b"], False)
    assert (values["learning_rate"], values["id"], values["time"]) == (1e-4, "007", "Zeit punkt")
    (folder / "mine.yaml").write_text(first)
    assert trellis("train", "--print-config", "--config", "mine.yaml").out == first
    assert list(folder.iterdir()) == [folder / "mine.yaml"]


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_configuration_has_a_name(trellis, name):
    printed = print_config(trellis, "--config", name)
    assert print_config(trellis, f"--config={name.upper()}") == printed
    # A data set starts from the configuration of its name.
    assert print_config(trellis, "co2" if name == "demo" else name) == printed


def test_a_later_file_and_then_options_override(trellis, folder):
    (folder / "a.yaml").write_text("width: 16\nnum_slots: 4\nlearning-rate: 1e-2\n")
    (folder / "b.yaml").write_text("width: 24\ntarget: load\nprecision: 32\n")
    values = print_config(trellis, "--config", "a.yaml", "--config", "b.yaml", "--num-slots", "5")
    assert (values["width"], values["num_slots"], values["learning_rate"]) == (24, 5, 0.01)
    assert (values["target"], values["precision"]) == (["load"], "32")


def test_a_file_named_like_a_data_set_does_not_replace_its_configuration(trellis, folder):
    (folder / "demo").write_text("width: 4\n")
    assert print_config(trellis, "co2")["width"] != 4
    assert print_config(trellis, "--config", "demo")["width"] == 4
