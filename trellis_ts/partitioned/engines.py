"""Who works on the blocks: this process one after the other, or the workers of a Ray cluster."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trellis_ts.datasets.partitions import Block
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.partitioned.jobs import ModelFiles

_Result = TypeVar("_Result", covariant=True)
# Blocks handed out at once for every processor of the cluster; more would only wait in its memory.
_BLOCKS_PER_PROCESSOR = 2
# How often a block is done anew whose worker has died.
_MOST_RETRIES = 5


class Job(Protocol[_Result]):
    """Something to do with every block, in whatever order."""

    def run(self, forecaster: Forecaster, block: Block) -> _Result: ...


def run_here(job: Job[_Result], forecaster: Forecaster, blocks: Sequence[Block]) -> Iterator[_Result]:
    """The results of all blocks, in this process."""
    for block in blocks:
        yield job.run(forecaster, block)


def check_ray() -> None:
    """Refuses to go on without Ray.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError('--engine ray needs Ray; install it with `pip install "trellis-ts[ray]"`')


def run_on_ray(
    job: Job[_Result], model: ModelFiles, blocks: Sequence[Block], address: str | None = None
) -> Iterator[_Result]:
    """The results of all blocks as they come, from the workers of a cluster; a block whose worker dies is done anew.

    Args:
        job: what to do.
        model: the model, which is sent along.
        blocks: their files must be readable from every node.
        address: of a running cluster; workers on this machine, one per processor, unless given.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
        TrellisError: what the job raises.
    """
    check_ray()
    ray: Any = import_module("ray")
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, address)
    try:
        task: Any = ray.remote(_run_block).options(
            num_cpus=1, num_gpus=1 if model.device.startswith("cuda") else 0, max_retries=_MOST_RETRIES
        )
        shared = ray.put((job, model))
        waiting = list(reversed(blocks))
        processors = int(ray.cluster_resources().get("CPU", 1))
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < _BLOCKS_PER_PROCESSOR * processors:
                running.append(task.remote(shared, waiting.pop()))
            done, running = ray.wait(running)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise ConfigError(
                    f"the workers of Ray died {_MOST_RETRIES + 1} times over one partition "
                    f"({str(error).splitlines()[0]}); give them more memory, then run again: what is finished is kept"
                ) from error
    finally:
        if is_ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    if address is None:
        options["num_cpus"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise ConfigError(f"{where} does not answer: {str(error).splitlines()[0]}") from error


def _run_block(shared: tuple[Job[_Result], ModelFiles], block: Block) -> _Result:
    job, model = shared
    return job.run(model.load(), block)
