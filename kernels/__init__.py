"""The Trellis memory as an operator: what is computed, and which implementation computes it."""

if __name__ != "trellis_ts.kernels":
    raise ImportError("this folder is trellis_ts.kernels; take the checkout root off sys.path")

from trellis_ts.kernels.dispatch import implementations
from trellis_ts.kernels.memory.cpu_run import precompile
from trellis_ts.kernels.memory.operator import trellis_memory, trellis_memory_step
from trellis_ts.kernels.memory.types import MemoryState

__all__ = ["MemoryState", "implementations", "precompile", "trellis_memory", "trellis_memory_step"]
