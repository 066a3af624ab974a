"""Everything can be imported without the extras, and what needs one says so."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys, warnings
EXTRAS = {"statsforecast", "huggingface_hub", "onnx", "onnxruntime", "onnxscript", "optuna", "sktime", "polars", "ray"}
sys.modules.update(dict.fromkeys(EXTRAS))  # None: as if it were not installed
warnings.simplefilter("ignore")
import trellis_ts
from trellis_ts.errors import TrellisError
names = [each.name for each in pkgutil.walk_packages(trellis_ts.__path__, "trellis_ts.")]
for folder in ("datasets", "kernels"):
    package = importlib.import_module(f"trellis_ts.{folder}")
    names += [each.name for each in pkgutil.walk_packages(package.__path__, f"trellis_ts.{folder}.")]
for name in names:
    if "triton_" in name or name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except (ImportError, TrellisError) as error:
        print(name, str(error).splitlines()[0])
print(len(names), "modules")
"""


def test_every_module_without_the_extras():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *refused, last = done.stdout.splitlines()
    assert int(last.split()[0]) > 100
    # An adapter whose base class is another package's cannot be imported without it.
    assert [line.split()[0] for line in refused] == ["trellis_ts.integrations.sktime"], refused
    assert "sktime" in refused[0].split(maxsplit=1)[1]
