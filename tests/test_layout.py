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
    {"presets", "safety", "loaders", "recovery"},
    {"kernels", "datasets", "configs"},
    {"losses", "metrics", "scaling", "patching", "heads", "significance", "covariates", "copula"},
    {"conformal", "adaptive"},
    {"layers"},
    {"model", "causal"},
    {"lightning", "baselines", "passes", "scores", "sizing", "statistical"},
    {"checkpoints", "doubts", "origins", "scored"},
    {"evaluation", "plots", "frames", "export", "hub", "explanations", "portraits"},
    {"linear_start"},
    {"preparation", "warm_start"},
    {"pacing"},
    {"training"},
    {"search"},
    {"forecaster", "streaming"},
    {"benchmark", "partitioned"},
    {"integrations", "commands"},
    {"__main__"},
]
ONLY_FROM = {"kernels": {"errors"}, "datasets": {"errors", "types"}}
KERNEL_LIBRARIES = {"torch", "jaxtyping", "triton", "numba", "llvmlite", "numpy"}
LIGHTNING_HOMES = {"trellis_ts.lightning", "trellis_ts.loaders", "trellis_ts.recovery", "trellis_ts.training"}
PANDAS_HOMES = {"datasets", "forecaster", "frames", "commands", "integrations", "scores"}
PRINT_HOMES = {"commands", "__main__"}
OUR_FOLDERS = {"kernels", "datasets", "configs"}


@dataclass(frozen=True)
class Import:
    """One imported module, with the names taken from it."""

    line: int
    module: str
    names: tuple[str, ...]
    for_types: bool


@dataclass(frozen=True)
class Source:
    """One parsed file; ``module`` is None outside the package."""

    path: Path
    module: str | None
    tree: ast.Module

    @property
    def part(self) -> str:
        """The rank's key: ``layers`` of ``trellis_ts.layers.block``, empty for the package itself."""
        return "" if self.module is None else ".".join(self.module.split(".")[1:2])

    def imports(self) -> list[Import]:
        typing_lines = {
            line
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for each in node.body
            for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)
        }
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [Import(node.lineno, alias.name, (), node.lineno in typing_lines) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                names = tuple(alias.name for alias in node.names)
                found.append(Import(node.lineno, module, names, node.lineno in typing_lines))
        return found


class Tree:
    """A checkout, read through the package map of its ``pyproject.toml``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
        self.packages: list[str] = settings["packages"]
        self.map: dict[str, str] = settings["package-dir"]
        self.modules: dict[str, Path] = {}
        for package in self.packages:
            for path in self.folder(package).glob("*.py"):
                name = package if path.stem == "__init__" else f"{package}.{path.stem}"
                self.modules[name] = path
        names = {path: name for name, path in self.modules.items()}
        self.sources = [
            Source(path, names.get(path), ast.parse(path.read_text(encoding="utf-8"), str(path)))
            for path in sorted(root.rglob("*.py"))
            if not any(part.startswith(".") or part in ("build", "dist") for part in path.relative_to(root).parts)
        ]

    def folder(self, package: str) -> Path:
        """The folder of a package, from the longest mapped prefix."""
        prefix, rest = package, []
        while prefix not in self.map:
            prefix, _, last = prefix.rpartition(".")
            rest.insert(0, last)
        return self.root.joinpath(self.map[prefix], *rest)

    def where(self, source: Source, line: int = 0) -> str:
        return f"{source.path.relative_to(self.root)}:{line}"

    def package_problems(self) -> list[str]:
        listed = {self.folder(package) for package in self.packages}
        present = {
            path.parent for folder in self.map.values() for path in (self.root / folder).rglob("*.py") if path.is_file()
        }
        return [
            *(f"{path.relative_to(self.root)} is not in [tool.setuptools].packages" for path in present - listed),
            *(f"{path.relative_to(self.root)} is listed but holds no module" for path in listed - present),
            *(f"{path.relative_to(self.root)} has no __init__.py" for path in present - {p.parent for p in self.inits}),
        ]

    @property
    def inits(self) -> list[Path]:
        return [path for path in self.modules.values() if path.name == "__init__.py"]

    def import_problems(self) -> list[str]:
        """Imports that lead nowhere: bare folder names, missing modules, missing names."""
        problems = []
        for source in self.sources:
            for each in source.imports():
                top = each.module.split(".")[0]
                if top in OUR_FOLDERS or not top:
                    problems.append(f"{self.where(source, each.line)} imports {each.module!r}; say trellis_ts....")
                if top != "trellis_ts":
                    continue
                if each.module not in self.modules:
                    problems.append(f"{self.where(source, each.line)} imports {each.module}, which is no file")
                    continue
                bound = self.bound_names(each.module)
                for name in each.names:
                    if name not in bound and f"{each.module}.{name}" not in self.modules:
                        problems.append(f"{self.where(source, each.line)}: {each.module} has no {name}")
        return problems

    def bound_names(self, module: str) -> set[str]:
        """What a module's top level defines, imports or assigns."""
        names: set[str] = set()
        tree = next(source.tree for source in self.sources if source.module == module)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
        return names

    def imported_modules(self, source: Source) -> list[tuple[int, str]]:
        """The package's modules a source needs when it runs, a sub-module imported by name included."""
        return [
            (each.line, f"{each.module}.{name}" if f"{each.module}.{name}" in self.modules else each.module)
            for each in source.imports()
            if each.module.split(".")[0] == "trellis_ts" and not each.for_types
            for name in each.names or ("",)
        ]

    def direction_problems(self) -> list[str]:
        rank_of = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
        problems = []
        for source in self.sources:
            if not source.part:
                if source.module and self.imported_modules(source):
                    problems.append(f"{self.where(source)} must stay free of imports: it runs before every module")
                continue
            if source.part not in rank_of:
                problems.append(f"{self.where(source)}: {source.part} has no rank in tests/test_layout.py")
                continue
            for line, module in self.imported_modules(source):
                part = ".".join(module.split(".")[1:2])
                allowed = ONLY_FROM.get(source.part)
                is_upward = rank_of.get(part, len(RANKS)) >= rank_of[source.part]
                if part != source.part and (is_upward or (allowed is not None and part not in allowed)):
                    problems.append(f"{self.where(source, line)}: {source.part} may not import {module}")
        return problems

    def library_problems(self) -> list[str]:
        problems = []
        for source in self.sources:
            if source.module is None:
                continue
            for each in source.imports():
                top = each.module.split(".")[0]
                is_ours = top in ("trellis_ts", "__future__") or top in sys.stdlib_module_names
                if source.part == "kernels" and not is_ours and top not in KERNEL_LIBRARIES:
                    problems.append(f"{self.where(source, each.line)}: kernels may not import {each.module}")
                if top in ("lightning", "pytorch_lightning") and source.module not in LIGHTNING_HOMES:
                    problems.append(f"{self.where(source, each.line)}: {source.module} may not import lightning")
                if top == "pandas" and source.part not in PANDAS_HOMES:
                    problems.append(f"{self.where(source, each.line)}: {source.module} may not import pandas")
        return problems

    def print_problems(self) -> list[str]:
        return [
            f"{self.where(source, node.lineno)} prints"
            for source in self.sources
            if source.module is not None and source.part not in PRINT_HOMES
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]

    def version_problems(self) -> list[str]:
        return [
            f"{self.where(source, node.lineno)} sets __version__; the version lives in pyproject.toml only"
            for source in self.sources
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Name) and node.id == "__version__" and isinstance(node.ctx, ast.Store)
        ]


CHECKS = ["package", "import", "direction", "library", "print", "version"]


@pytest.fixture(scope="module")
def tree():
    return Tree(ROOT)


@pytest.mark.parametrize("check", CHECKS)
def test_the_tree_is_in_order(tree, check):
    assert getattr(tree, f"{check}_problems")() == []


def test_every_module_is_seen(tree):
    assert tree.modules["trellis_ts.datasets.windows"] == ROOT / "datasets" / "windows.py"
    assert {"trellis_ts", "trellis_ts.kernels.memory.reference", "trellis_ts.layers.block"} <= set(tree.modules)
    assert {source.part for source in tree.sources} > {"model", "datasets", "kernels", "commands"}
    assert any(source.path.name == "test_layout.py" and source.module is None for source in tree.sources)


def test_the_version_in_pyproject_is_the_installed_one():
    from importlib.metadata import version

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version("trellis-ts")


# What each check is there to catch, as one file added to a small tree in order.
OFFENCES = [
    ("package", "trellis_ts/extra/__init__.py", "", "trellis_ts/extra is not in"),
    ("package", "kernels/extra/thing.py", "", "kernels/extra is not in"),
    ("import", "trellis_ts/model.py", "import kernels", "'kernels'"),
    ("import", "trellis_ts/model.py", "from datasets.x import y", "'datasets.x'"),
    ("import", "trellis_ts/model.py", "from . import errors", "'.'"),
    ("import", "trellis_ts/model.py", "from trellis_ts.nowhere import x", "no file"),
    ("import", "trellis_ts/model.py", "def f():\n    from trellis_ts.errors import Nothing", "has no Nothing"),
    (
        "import",
        "tests/test_x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trellis_ts.gone",
        "no file",
    ),
    ("direction", "trellis_ts/errors.py", "from trellis_ts.model import x", "errors may not import"),
    ("direction", "trellis_ts/model.py", "def f():\n    import trellis_ts.forecaster", "model may not import"),
    ("direction", "trellis_ts/training.py", "from trellis_ts import forecaster", "training may not import"),
    ("direction", "trellis_ts/novelty.py", "", "novelty has no rank"),
    ("direction", "trellis_ts/__init__.py", "import trellis_ts.errors", "must stay free"),
    ("direction", "kernels/__init__.py", "from trellis_ts.types import x", "kernels may not import"),
    ("library", "kernels/__init__.py", "import scipy", "may not import scipy"),
    ("library", "trellis_ts/model.py", "def f():\n    from lightning.pytorch import Trainer", "lightning"),
    ("library", "trellis_ts/model.py", "import pandas as pd", "pandas"),
    ("print", "trellis_ts/model.py", "def f():\n    print('hello')", "prints"),
    ("version", "trellis_ts/__init__.py", "__version__ = '1'", "__version__"),
]


@pytest.mark.parametrize(("check", "path", "text", "complaint"), OFFENCES)
def test_each_offence_is_caught(tmp_path, check, path, text, complaint):
    names = ("__init__", "errors", "types", "model", "training", "forecaster")
    for name in (*(f"trellis_ts/{name}.py" for name in names), "kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.setuptools]\npackages = ["trellis_ts", "trellis_ts.kernels"]\n'
        '[tool.setuptools.package-dir]\ntrellis_ts = "trellis_ts"\n"trellis_ts.kernels" = "kernels"\n'
    )
    for each in CHECKS:
        assert getattr(Tree(tmp_path), f"{each}_problems")() == []
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text + "\n")
    problems = getattr(Tree(tmp_path), f"{check}_problems")()
    assert any(complaint in problem for problem in problems), problems
