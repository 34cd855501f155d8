"""Who may import whom: the layers of the design, read from the source and not from what happens to be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: package (or module) -> prefixes of ours that it may import. Its own package is always allowed.
ALLOWED: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "jqserve.errors": set(),
    "jqserve.credentials": {"jqserve.errors"},
    "jqserve.quant": {"jqserve.errors"},
    "jqserve.models.config": set(),
    "jqserve.parallel": {"jqserve.quant", "jqserve.errors"},
    "jqserve.checkpoint": {"jqserve.quant", "jqserve.models.config", "jqserve.errors"},
    "jqserve.quantize": {
        "jqserve.checkpoint",
        "jqserve.ops",
        "jqserve.quant",
        "jqserve.models.config",
        "jqserve.models.rope",
        "jqserve.errors",
    },
    "jqserve.evaluate": {
        "jqserve.library",
        "jqserve.checkpoint",
        "jqserve.quant",
        "jqserve.engine",
        "jqserve.models",
        "jqserve.server.tokenizer",
        "jqserve.errors",
    },
    "jqserve.ops": {"jqserve.quant", "jqserve.parallel", "jqserve.errors", "pallas_kernels"},
    "jqserve.models": {"jqserve.ops", "jqserve.quant", "jqserve.parallel", "jqserve.errors"},
    "jqserve.engine": {
        "jqserve.models",
        "jqserve.ops",
        "jqserve.parallel",
        "jqserve.quant",
        "jqserve.checkpoint",
        "jqserve.errors",
    },
    # Tells --quantization awq and gptq from schemes that need no data, and reads that data as `jqserve quantize` does.
    "jqserve.engine.calibrated": {
        "jqserve.checkpoint",
        "jqserve.quantize",
        "jqserve.server.tokenizer",
        "jqserve.errors",
    },
    # Chat messages become the same ids in process as over gRPC.
    "jqserve.engine.api": {
        "jqserve.checkpoint",
        "jqserve.engine",
        "jqserve.server.tokenizer",
        "jqserve.errors",
    },
    "jqserve.server": {"jqserve.engine.request", "jqserve.engine.wire", "jqserve.credentials", "jqserve.errors"},
    # A Hub id is a folder of the cache to it, as it is to the engine.
    "jqserve.server.tokenizer": {"jqserve.checkpoint.hub", "jqserve.server", "jqserve.errors"},
    # Starts the engine at the other end of a socket pair; with --frontend inline the pair's far end is in this process.
    "jqserve.server.launch": {"jqserve.server", "jqserve.engine.channel", "jqserve.engine.wire"},
    "jqserve.client": {"jqserve.server.pb", "jqserve.credentials", "jqserve.errors"},
}

#: (file or folder under the root, packages that it must not import, directly or through ours)
FORBIDDEN = [
    ("pallas_kernels", {"flax", "jqserve", "torch", "transformers", "grpc"}),
    ("jqserve/checkpoint", {"flax", "torch", "transformers", "grpc"}),
    ("jqserve/quantize", {"flax", "torch", "transformers", "grpc"}),
    ("jqserve/evaluate", {"flax", "torch", "grpc"}),
    ("jqserve/quant", {"flax", "torch", "transformers", "grpc"}),
    ("jqserve/server", {"jax", "jaxlib", "flax", "torch"}),
    ("jqserve/client", {"jax", "jaxlib", "flax", "torch", "transformers"}),
    ("jqserve/engine/request.py", {"jax", "flax", "numpy"}),
    ("jqserve/engine/pages.py", {"jax", "flax"}),
    ("jqserve/engine/scheduler.py", {"jax", "flax"}),
    ("jqserve/engine/buckets.py", {"jax", "flax"}),
    ("jqserve/engine/wire.py", {"jax", "flax"}),
    ("jqserve/engine/channel.py", {"jax", "flax"}),
]


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, anywhere in the file, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(module_name(path).split(".")[: -node.level + (path.name == "__init__.py")])
            found.add(f"{base}.{node.module}" if node.module else base)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return [p for top in ("jqserve", "pallas_kernels") for p in sorted((ROOT / top).rglob("*.py"))]


def inside(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_only_what_its_layer_may(path: Path) -> None:
    module = module_name(path)
    layers = [layer for layer in ALLOWED if inside(module, layer)]
    if not layers:
        return  # the command line, the demo and the package's own top import anything of ours
    layer = max(layers, key=len)
    allowed = ALLOWED[layer] | {layer}
    if layer == "jqserve.models.config":
        allowed = ALLOWED[layer]
    for name in imports(path):
        if (inside(name, "jqserve") and name != "jqserve") or inside(name, "pallas_kernels"):
            known = any(inside(name, prefix) or inside(prefix, name) for prefix in allowed)
            assert known, f"{module} imports {name}; {layer} may import {sorted(allowed)}"


@pytest.mark.parametrize(("where", "banned"), FORBIDDEN, ids=[w for w, _ in FORBIDDEN])
def test_no_forbidden_package(where: str, banned: set[str]) -> None:
    target = ROOT / where
    files = sorted(target.rglob("*.py")) if target.is_dir() else [target]
    assert files and all(f.exists() for f in files), f"{where} is gone: mend FORBIDDEN"
    for path in files:
        for name in imports(path):
            assert not any(inside(name, b) for b in banned), f"{path} imports {name}"


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("jqserve", "torch"),
        ("jqserve.client", "jax transformers torch"),
        ("jqserve.quant", "jax"),
        ("jqserve.checkpoint.forecast", "jax flax transformers torch"),
        ("jqserve.engine.kernel_plan", "jax flax transformers torch"),
        ("pallas_kernels", "jax"),
        ("jqserve.server.servicer", "jax flax torch"),
    ],
)
def test_importing_does_not_load(module: str, banned: str) -> None:
    """Checked in a fresh interpreter: what our modules import through others counts too."""
    code = f"import sys, {module}; bad = [m for m in {banned.split()!r} if m in sys.modules]; assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_jqserve_touches_no_device() -> None:
    code = (
        "import jqserve\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was initialised by import jqserve'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
