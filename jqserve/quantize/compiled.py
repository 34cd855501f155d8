"""`jax.jit` for the quantizers' programs."""

from __future__ import annotations

import functools

import jax

from jqserve.ops.compiler_options import compiler_options

#: Nothing is timed while compiling (the first layer of an 8B model spent 80 s on it, on an H200), and loops are not
#: unrolled into CUDA graphs (a solver's has as many turns as a matrix has columns).
compiled = functools.partial(jax.jit, compiler_options=compiler_options(captured=False))
