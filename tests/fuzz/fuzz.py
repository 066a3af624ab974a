"""Feeds broken files to every reader and loader, and keeps those that end otherwise than in a ``TrellisError``.

    python tests/fuzz/fuzz.py                              # all targets, a minute of processor time each
    python tests/fuzz/fuzz.py csv model --minutes 30
    python tests/fuzz/fuzz.py csv --engine atheris         # guided by coverage (pip install atheris)

Cases run in child processes with a limit on memory and processor time, so a crash or a hang is found as well. A finding
is written to ``--findings`` under its target's name; a fixed one moves to ``corpus/``, which the ordinary tests replay.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
# What one case may take: memory beyond what the process holds at the start, and processor time.
LIMIT_BYTES = 1 << 30
LIMIT_SECONDS = 10
_LARGEST_CASE = 1 << 16
_NUMBERS = (b"0", b"-1", b"1", b"255", b"65536", b"2147483648", b"9223372036854775807", b"1e308", b"0.1")


def load_targets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_targets", HERE / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TooSlow(BaseException):
    """A case over its time limit; no handler for ordinary exceptions catches it."""


def try_case(target: Any, data: bytes, folder: Path) -> str | None:
    """Runs one case; what went wrong, or None."""
    from trellis_ts.errors import TrellisError

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    try:
        target.run(data, folder)
    except TrellisError as error:
        message = str(error)
        return (
            None
            if "\n" not in message and len(message) < 2000
            else f"message of {len(message)} characters: {error!r:.300}"
        )
    except (TooSlow, MemoryError) as error:
        return f"{type(error).__name__}: over the limit"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def warm_up(target: Any, folder: Path) -> None:
    """Tries the seeds without limits, for imports and caches are not to count."""
    from trellis_ts.errors import TrellisError

    for data in target.seeds:
        with contextlib.suppress(TrellisError):
            target.run(data, folder)


def limit_memory() -> None:
    """Allocations beyond the limit fail from here on."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT_BYTES, held + LIMIT_BYTES))


def mutate(data: bytes, target: Any, generator: random.Random) -> bytes:
    """A few random changes, from single bits to pieces of other seeds."""
    content = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 3, 5, 8))):
        at = generator.randrange(len(content) + 1)
        to = min(len(content), at + generator.choice((1, 2, 4, 8, 16, 64, 256)))
        match generator.randrange(8):
            case 0 if at < len(content):
                content[at] ^= 1 << generator.randrange(8)
            case 1:
                del content[at:to]
            case 2:
                content[at:at] = content[at:to] * generator.choice((1, 2, 8))
            case 3 | 4:
                content[at : generator.choice((at, to))] = generator.choice(target.words)
            case 5:
                content[at:to] = generator.choice(_NUMBERS)
            case 6:
                other = generator.choice(target.seeds)
                start = generator.randrange(len(other) + 1)
                content[at:to] = other[start : start + generator.choice((4, 32, 256))]
            case 7:
                content[at:to] = generator.randbytes(to - at)
    return bytes(content[:_LARGEST_CASE])


def fuzz_by_mutation(name: str, seconds: float, seed: int, current: Path) -> None:
    """Tries mutated seeds until the time is up; a finding ends it with its report on standard error."""
    target = load_targets().TARGETS[name]
    generator = random.Random(seed)
    count, stop = 0, time.process_time() + seconds
    with tempfile.TemporaryDirectory() as folder:
        warm_up(target, Path(folder))
        limit_memory()
        while time.process_time() < stop:
            data = mutate(generator.choice(target.seeds), target, generator)
            current.write_bytes(data)
            count += 1
            if (problem := try_case(target, data, Path(folder))) is not None:
                report(problem, count)
    report(None, count)


def fuzz_by_coverage(name: str, seconds: float, seed: int, current: Path) -> None:
    """The same, guided by which lines of the package a case reaches."""
    import atheris

    from trellis_ts.datasets.gathering import scaled_windows
    from trellis_ts.kernels import precompile

    # Imported before anything is added to them: Numba compiles these modules, and cannot read what is added.
    precompile(backward=False)
    scaled_windows()
    with atheris.instrument_imports(include=["trellis_ts", "fuzz_targets"]):
        target = load_targets().TARGETS[name]
    folder = tempfile.TemporaryDirectory()
    seeds = Path(folder.name) / "seeds"
    seeds.mkdir()
    for index, data in enumerate(target.seeds):
        (seeds / str(index)).write_bytes(data)
    warm_up(target, Path(folder.name))
    count, stop = 0, time.process_time() + seconds

    def case(data: bytes) -> None:
        nonlocal count
        if count == 0:
            limit_memory()  # not before: what libFuzzer takes at its start is not a case's
        count += 1
        current.write_bytes(data)
        if (problem := try_case(target, data, Path(folder.name))) is not None:
            report(problem, count)
        if time.process_time() > stop:
            report(None, count)

    words = Path(folder.name) / "words"
    spelled = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    words.write_text("".join(f'"{each}"\n' for each in spelled))
    options = ["-rss_limit_mb=0", f"-seed={seed + 1}", f"-max_len={_LARGEST_CASE}", "-verbosity=0", f"-dict={words}"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], case)
    atheris.Fuzz()


def report(problem: str | None, count: int) -> None:
    """Ends the child: standard output holds how many cases ran, standard error what was found."""
    sys.stdout.write(f"{count}\n")
    sys.stdout.flush()
    if problem is not None:
        sys.stderr.write(problem)
        sys.stderr.flush()
    os._exit(1 if problem else 0)


def run_child(name: str, seconds: float, seed: int, engine: str, current: Path) -> tuple[int, str | None]:
    """Cases tried, and what was wrong with the last one, whose bytes are in ``current``."""
    command = [sys.executable, __file__, name, "--child", str(current), "--engine", engine, "--seed", str(seed)]
    command += ["--minutes", str(seconds / 60)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    count = int(done.stdout.split()[-1]) if done.stdout.split() else 0
    if done.returncode == 0:
        return count, None
    if done.returncode == -signal.SIGXCPU:
        return count, "hangs beyond what can be interrupted"
    return count, done.stderr if done.returncode == 1 else f"ended with {done.returncode}\n{done.stderr[-2000:]}"


def processor_seconds() -> float:
    """What the children that have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def signature(problem: str) -> str:
    """What findings of one cause share: the kind of error and the innermost lines of ours."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    ours = [
        line.split(", in ")[0]
        for line in lines
        if line.startswith("File") and ("trellis_ts" in line or "/datasets/" in line)
    ]
    return hashlib.sha256("|".join([lines[-1].split(":")[0], *ours[-1:]]).encode()).hexdigest()[:12]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("targets", nargs="*", help="names in targets.py; all unless given")
    options.add_argument("--minutes", type=float, default=1.0, help="of processor time per target")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    options.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    values = options.parse_args()
    if values.child is not None:
        warnings.simplefilter("ignore")
        most = int(values.minutes * 60) + 120  # what loading and the last case may take on top
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 10))
        engine = fuzz_by_coverage if values.engine == "atheris" else fuzz_by_mutation
        engine(values.targets[0], values.minutes * 60, values.seed, values.child)
        return
    found: set[str] = set()
    for name in values.targets or load_targets().TARGETS:
        total, seed, begin = 0, values.seed, processor_seconds()
        while (left := values.minutes * 60 - (processor_seconds() - begin)) > 1:
            with tempfile.NamedTemporaryFile() as current:
                count, problem = run_child(name, left, seed, values.engine, Path(current.name))
                total, seed = total + count, seed + 1
                if problem is None or (key := f"{name}-{signature(problem)}") in found:
                    continue
                found.add(key)
                values.findings.mkdir(parents=True, exist_ok=True)
                (values.findings / key).write_bytes(Path(current.name).read_bytes())
                (values.findings / f"{key}.txt").write_text(problem, encoding="utf-8")
                print(f"{name}: {problem.strip().splitlines()[-1]} ({values.findings / key})", flush=True)
        findings = sum(key.startswith(name + "-") for key in found)
        spent = processor_seconds() - begin
        print(f"{name}: {total:,} cases in {spent:,.0f} processor seconds, {findings} findings", flush=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
