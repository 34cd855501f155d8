#!/usr/bin/env python
"""Generates jqserve/server/pb from protos/ (needs grpcio-tools). `--check DIR` writes to DIR instead; a test diffs it.

protoc derives a Python package from the .proto's path (jqserve/v1), which is not where the code lives; one import line
of the gRPC stub is therefore rewritten. The proto package, and so everything on the wire, stays jqserve.v1.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT.parent / "jqserve" / "server" / "pb"
NAMES = ("jqserve_pb2.py", "jqserve_pb2.pyi", "jqserve_pb2_grpc.py")


def generate(out: Path) -> None:
    """Writes the three generated files to `out`, which exists. Raises RuntimeError when protoc fails."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
        arguments += [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main([*arguments, "jqserve/v1/jqserve.proto"]):
            raise RuntimeError("protoc failed")
        for name in NAMES:
            text = (Path(scratch) / "jqserve" / "v1" / name).read_text()
            text = text.replace("from jqserve.v1 import jqserve_pb2", "from jqserve.server.pb import jqserve_pb2")
            (out / name).write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[2]) if sys.argv[1:2] == ["--check"] else PACKAGE)
