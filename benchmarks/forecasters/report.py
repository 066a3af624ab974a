"""The tables made of the cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLUMNS = (
    ("MASE", "mase", "{:.4f}"),
    ("WQL", "weighted_quantile_loss", "{:.4f}"),
    ("RMSSE", "rmsse", "{:.3f}"),
    ("MSE", "mse", "{:.4f}"),
    ("MAE", "mae", "{:.4f}"),
    ("80 % band", "coverage_80", "{:.1%}"),
    ("95 % band", "coverage_95", "{:.1%}"),
)
_HEAD = "| contestant | seed | " + " | ".join(name for name, *_ in _COLUMNS) + " | training s | all s | MiB | load |"


def markdown(cells: list[dict[str, Any]], command: str) -> str:
    """All cells, a section per data set, the lowest MASE first; what failed or was skipped is said."""
    lines = ["# Forecasters compared", "", f"Written by `{command}`; `docs/benchmarks.md` says how to read it.", ""]
    for case in dict.fromkeys(cell["case"] for cell in cells):
        own = [cell for cell in cells if cell["case"] == case]
        done = sorted((cell for cell in own if "scores" in cell), key=lambda cell: float(cell["scores"]["mase"]))
        lines += [f"## {case}", ""]
        if done:
            job, first = done[0]["job"], done[0]["scores"]
            lines += [
                f"{first['num_windows']:,} windows of {job['horizon']} steps, {first['num_values']:,} values; season "
                f"of {job['seasons'][0]} rows; known covariates: {', '.join(job['known']) or 'none'}.",
                "",
                _HEAD,
                "|" + "---|" * (_HEAD.count("|") - 1),
            ]
        lines += [_row(cell) for cell in done]
        lines += [f"\n{cell['contestant']}, seed {cell['seed']}: {cell['reason']}" for cell in own if "reason" in cell]
        lines.append("")
        if done:
            lines += [*_lost(done), *_adaptive(done), "", _provenance(done), ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(cell: dict[str, Any]) -> str:
    values = [form.format(cell["scores"][key]) for _, key, form in _COLUMNS]
    load = f"{cell['load_before']:.1f} to {cell['load_after']:.1f}"
    budget = f" of {cell['budget_seconds']:g}" if cell["has_budget"] else ""
    seconds = f"{cell['notes']['train_seconds']:.0f}{budget} | {cell['seconds']:.0f}"
    return f"| {cell['contestant']} | {cell['seed']} | {' | '.join(values)} | {seconds} | {cell['peak_mib']} | {load} |"


def _provenance(cells: list[dict[str, Any]]) -> str:
    times = sorted(cell["started"] for cell in cells)
    commits = ", ".join(sorted({cell["commit"] for cell in cells}))
    machines = "; ".join(sorted({cell["machine"] for cell in cells}))
    versions: dict[str, set[str]] = {}
    for cell in cells:
        for name, version in cell["versions"].items():
            versions.setdefault(name, set()).add(version)
    spelled = ", ".join(f"{name} {'/'.join(sorted(each))}" for name, each in sorted(versions.items()))
    return f"Run from {times[0]} to {times[-1]} UTC at commit {commits} on {machines}; {spelled}."


def _lost(cells: list[dict[str, Any]]) -> list[str]:
    """Where the package is not ahead of everyone, in words."""
    ours = [cell for cell in cells if cell["contestant"].startswith("trellis")]
    lines = []
    for label, key in (("MASE", "mase"), ("WQL", "weighted_quantile_loss")):
        for cell in ours:
            better = [
                f"{each['contestant']} ({each['scores'][key]:.4f})"
                for each in cells
                if each not in ours and each["scores"][key] <= cell["scores"][key]
            ]
            found = f"not below {', '.join(better)}" if better else "below all others"
            lines.append(
                f"- {label} of {cell['contestant']} (seed {cell['seed']}): {cell['scores'][key]:.4f}, {found}."
            )
    return lines


def _adaptive(cells: list[dict[str, Any]]) -> list[str]:
    """Coverage of bands that follow what came true, where it was measured."""
    lines = []
    for cell in cells:
        if found := cell["notes"].get("adaptive_coverage"):
            spelled = ", ".join(f"{share:.1%} of the {float(band):.0%} band" for band, share in found.items())
            lines.append(f"- With `--adaptive`, {cell['contestant']} (seed {cell['seed']}) covers {spelled}.")
    return lines


def write(results: Path, path: Path, cells: list[dict[str, Any]], command: str) -> None:
    """Writes the table beside the folder of cells."""
    path.write_text(markdown(cells, command), encoding="utf-8")
