"""What the tests of training share."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture
def quiet_lightning():
    """Lightning's advice on workers and loggers is not about us; every other warning still is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        yield
