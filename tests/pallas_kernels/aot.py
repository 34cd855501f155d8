"""Compiles a jax function for an H200 on a machine without a GPU, and reads what ptxas made of it.

Needs the wheels of `jax[cuda13]`'s plugin and compiler (no driver, no device). `make test` installs them into .venv/aot
(.ci/setup); JQSERVE_AOT_SITE names another folder, and an importable installation serves too. Tests skip without, and
say so.
With `nvidia-cuda-nvdisasm` there too, `Compiled.sass` holds the machine code.

    compiled = compile_for_h200(lambda a, b: op(a, b), jax.ShapeDtypeStruct(...), ...)
    assert compiled.spill_bytes == 0 and compiled.registers <= 168 and compiled.count("wgmma.mma_async") == 8
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels.dispatch import KNOWN_DEVICES, use_device

# xla.gpu.GpuTargetConfigProto of an H200 (data-sheet figures), as text. Without the driver's version XLA takes it for
# one that cannot capture custom calls or cuBLASLt, and makes other command buffers than it does on the device.
_H200 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536
 driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H200"
runtime_version { major: 13 }
"""

_DUMPED = ("ptx", "ptxas", "sass_ctrl")  # file endings that Mosaic GPU writes under MOSAIC_GPU_DUMP_TO


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out for all Mosaic GPU kernels of one function together."""

    executable: Any  # jax.stages.Compiled; it cannot run here
    ptx: str  # all kernels' PTX, joined
    sass: str  # the same as machine code; empty without nvdisasm
    registers: int  # per thread, the largest over the kernels (before setmaxnreg)
    spill_bytes: int  # stores + loads, summed over the kernels
    stack_bytes: int
    hlo: str
    report: str = ""  # what ptxas said
    thunks: str = ""  # XLA's dump of the thunk sequence, command buffers made; where asked for

    def count(self, text: str) -> int:
        """How often `text` occurs in the PTX, e.g. "wgmma.mma_async"."""
        return self.ptx.count(text)


def _site() -> Path | None:
    """Folder whose nvidia/cu13 holds ptxas, with the plugin importable; None where something is missing."""
    installed = Path(__file__).resolve().parents[2] / ".venv/aot"
    for site in (os.environ.get("JQSERVE_AOT_SITE"), str(installed), *sys.path):
        if site and (Path(site) / "nvidia/cu13/bin/ptxas").is_file():
            if site not in sys.path:
                sys.path.append(site)
            return Path(site) if importlib.util.find_spec("jax_plugins.xla_cuda13") else None
    return None


@functools.cache
def h200_sharding() -> jax.sharding.NamedSharding:
    site = _site()
    if site is None:
        pytest.skip("device-less compile needs jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm")
    root = str(site / "nvidia/cu13")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["CUDA_ROOT"] = root
    os.environ["MOSAIC_GPU_CUDA_ROOT"] = root
    os.environ["PATH"] = f"{root}/bin:{os.environ['PATH']}"
    plugin = importlib.util.find_spec("jax_cuda13_plugin")
    assert plugin is not None and plugin.origin is not None
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(Path(plugin.origin).parent / "libmosaic_gpu_runtime.so")
    from jax._src import xla_bridge
    from jax.experimental import topologies

    xla_bridge._discover_and_register_pjrt_plugins()
    if "cuda" not in xla_bridge._topology_factories:  # JAX looked for plugins before `_site` extended sys.path
        importlib.import_module("jax_plugins.xla_cuda13").initialize()
    topology = topologies.get_topology_desc(topology_name="", platform="cuda", topology="1x1x1", target_config=_H200)
    mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@contextlib.contextmanager
def _environment(**values: str):
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def compile_for_h200(
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: tuple[int, ...] = (),
    compiler_options: Any = None,
    thunks: bool = False,
) -> Compiled:
    """Lowers and compiles `fn(*args)` for an H200; `args` are arrays or ShapeDtypeStructs (or pytrees of them).

    Skips the calling test when the compiler's wheels are absent. Functions that call `dispatch.current_device()`
    see the H200.
    """
    sharding = h200_sharding()
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    # A fresh function object: the jit cache must not return a trace made for the CPU.
    traced = jax.jit(lambda *a: fn(*a), donate_argnums=donate_argnums)
    with tempfile.TemporaryDirectory() as folder:
        options = {**(compiler_options or {}), **({"xla_dump_to": f"{folder}/xla"} if thunks else {})}
        with _environment(MOSAIC_GPU_DUMP_TO=folder), use_device(KNOWN_DEVICES["h200"]):
            executable = traced.lower(*abstract).compile(options or None)
        # Where command buffers were made there is a second file, `..._after_thunk_passes`.
        dumped = [p.read_text() for p in sorted(Path(folder).glob("xla/*.thunk_sequence*.txt"))]
        dump = {end: "\n".join(p.read_text() for p in sorted(Path(folder).glob(f"*.{end}"))) for end in _DUMPED}
    report = dump["ptxas"]
    numbers = lambda pattern: [int(n) for n in re.findall(pattern, report)]  # noqa: E731
    return Compiled(
        executable=executable,
        ptx=dump["ptx"],
        sass=dump["sass_ctrl"],
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        spill_bytes=sum(numbers(r"(\d+) bytes spill")),
        stack_bytes=sum(numbers(r"(\d+) bytes stack frame")),
        hlo=executable.as_text(),
        report=report,
        thunks=dumped[-1] if dumped else "",
    )
