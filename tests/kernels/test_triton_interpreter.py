"""Runs interpreted.py in a process of its own, under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_kernels_agree_with_the_reference_under_the_interpreter():
    script = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "--durations=10", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
