#!/usr/bin/env python
"""Generates jqserve/server/pb from protos/ (needs grpcio-tools). `--check DIR` writes to DIR instead; a test diffs it.

protoc derives a Python package from the .proto's path (jqserve/v1), which is not where the code lives; the import lines
between the generated files are therefore rewritten. The proto packages, and so everything on the wire, stay as written.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT.parent / "jqserve" / "server" / "pb"
PROTOS = ("v1/jqserve", "compat/common", "compat/vllm_engine", "compat/sglang_scheduler")
NAMES = tuple(
    f"{name.split('/')[1]}{end}"
    for name in PROTOS
    for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    if name != "compat/common" or end != "_pb2_grpc.py"  # it has no service
)


def generate(out: Path) -> None:
    """Writes the generated files to `out`, which exists. Raises RuntimeError when protoc fails."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
        arguments += [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main([*arguments, *(f"jqserve/{name}.proto" for name in PROTOS)]):
            raise RuntimeError("protoc failed")
        found = {path.name: path for path in Path(scratch).rglob("*.py*")}
        for name in NAMES:
            text = found[name].read_text()
            (out / name).write_text(re.sub(r"from jqserve\.(v1|compat) import", "from jqserve.server.pb import", text))


if __name__ == "__main__":
    generate(Path(sys.argv[2]) if sys.argv[1:2] == ["--check"] else PACKAGE)
