"""The tree: every package is installed, every import resolves, and imports point one way only."""

from __future__ import annotations

import ast
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from lower ranks, and from its own package where that has sub-modules. A new module goes into the
# rank it needs; the order is that of a datum's way from the table to the command line.
RANKS = [
    {"errors"},
    {"quantiles"},
    {"distributions"},
    {"types", "config", "files", "devices", "shuffling"},
    {"presets"},
    {"kernels", "datasets", "configs"},
    {"losses", "metrics", "scaling", "patching", "heads", "significance", "covariates", "copula"},
    {"conformal", "adaptive"},
    {"layers"},
    {"model", "causal"},
    {"lightning", "baselines", "passes", "scores", "sizing", "statistical"},
    {"checkpoints"},
    {"evaluation", "plots", "frames", "export", "hub", "explanations", "portraits"},
    {"preparation", "linear_start", "warm_start"},
    {"pacing"},
