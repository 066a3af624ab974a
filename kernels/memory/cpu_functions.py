"""How the functions inside the CPU kernels are compiled: as parts of a kernel, never by themselves.

Numba optimises every function it compiles, and turns it into machine code, together with all it calls. A kernel of
fifty functions, six deep, would so be optimised several times over, and only the last time counts. Here a function is
translated to LLVM's code and left at that until a kernel calls it, which halves the time a kernel takes to compile.
"""

from __future__ import annotations

import ctypes

from numba import cfunc, njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _NoPython:
    """Stands in for where Numba would register what a function needs of Python, which parts never call."""

    @staticmethod
    def set_env(name, environment):
        pass


class _Part(JITCodeLibrary):
    """Code that is only ever linked into that of its callers."""

    codegen = _NoPython

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0  # there is no function Python could call


class _PartCompiler(Compiler):
    def define_pipelines(self):
        self.state.library = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


# Small parts disappear into their callers; the larger ones stay functions, or compiling would take a minute. That has
# to be said: what is first called by a part that disappears would otherwise inherit it. Nothing here is for Python.
_PART = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": _PartCompiler,
}
INLINE = {**_PART, "forceinline": True}
inline = njit(**INLINE)
function = njit(**_PART, forceinline=False)


def build_entry(kernel, scalar, cache):
    """Compile a kernel that takes one address, for ``numba.float32`` or ``numba.float64``, or find it in Numba's cache.

    Returns:
        What ctypes calls at the compiled kernel's address, without the interpreter lock.
    """
    compiled = cfunc(types.void(types.CPointer(scalar)), cache=cache, error_model="numpy")(kernel)
    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    entry.compiled = compiled  # the code is in its memory
    return entry
