"""Prints pip constraints for one end of the ranges in ``pyproject.toml``: ``bounds.py oldest`` or ``bounds.py newest``.

Torch is the pinned one at both ends, for another would be gigabytes to fetch. What dependencies depend on, and the test
tools, are the newest that fit.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(end: str) -> None:
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = [torch]
    if end == "oldest":
        bounds = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", each) for each in dependencies if "win32" not in each]
        lines += [f"{match[1]}=={match[2]}" for match in bounds if match and match[1] not in ("torch", "triton")]
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1])
