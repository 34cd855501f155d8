"""What is written loads, unchanged, with the peers' own code, and gives the logits that jqserve gives.

Needs an interpreter that has them: JQSERVE_PEERS_PYTHON, or .venv-peers/bin/python. Made with
    python3.11 -m venv .venv-peers
    .venv-peers/bin/pip install torch transformers compressed-tensors gptqmodel==7.6.0
    .venv-peers/bin/pip install --no-deps autoawq==0.2.9
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jqserve
from jqserve.quantize.job import quantize
from jqserve.quantize.options import Options
from tests.checkpoint import tiny

pytestmark = pytest.mark.peers
ROOT = Path(__file__).resolve().parents[2]
IDS = np.random.default_rng(1).integers(3, tiny.CONFIG["vocab_size"], (2, 24)).astype(np.int32)
SAMPLES = np.random.default_rng(0).integers(0, tiny.CONFIG["vocab_size"], (8, 32)).astype(np.int32)
DOWN = "model.layers.1.mlp.down_proj"
#: name -> (who reads it, options, bound of |difference| / |logits|). GPTQModel computes in float16: 2^-11 a rounding.
#: transformers' compressed-tensors keeps scales and
#: products in the model's bfloat16 for packed integers where it unpacks them while loading: 2^-8 a weight.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "gptq v1": ("gptqmodel", {"scheme": "gptq"}, 2e-2),
    "gptq asym": ("gptqmodel", {"scheme": "gptq", "symmetric": False, "group_size": 32}, 2e-2),
    "gptq v2 act-order": (
        "gptqmodel",
        {"scheme": "gptq", "format": "gptq_v2", "act_order": True, "group_size": 64},
        1e-3,
    ),
    "gptq 8 bit, a layer left": ("gptqmodel", {"scheme": "gptq", "bits": 8, "ignore": (DOWN,)}, 2e-2),
    "awq": ("autoawq", {"scheme": "awq", "group_size": 64}, 1e-3),
    "awq per channel": ("autoawq", {"scheme": "awq", "group_size": -1}, 1e-3),
    "awq, gptqmodel": ("gptqmodel", {"scheme": "awq", "group_size": 64}, 2e-2),
    "ct w4a16": ("transformers", {"scheme": "w4a16"}, 1e-2),
    "ct awq asym": ("transformers", {"scheme": "awq", "format": "compressed-tensors"}, 1e-2),
    "ct w8a16": ("transformers", {"scheme": "w8a16", "ignore": (DOWN,)}, 1e-2),
    "ct fp8": ("transformers", {"scheme": "fp8-dynamic", "kv_cache": "fp8"}, 1e-2),
    "ct fp8 static": ("transformers", {"scheme": "fp8-static"}, 1e-2),
    "ct int8": ("transformers", {"scheme": "w8a8-int8", "smoothquant": 0.5}, 1e-2),
    "ct gptq act-order": (
        "transformers",
        {"scheme": "gptq", "format": "compressed-tensors", "act_order": True, "group_size": -1},
        1e-2,
    ),
    "ct fp8 block": ("transformers", {"scheme": "fp8-block"}, 1e-2),
    "fp8 block": ("transformers", {"scheme": "fp8-block", "format": "fp8"}, 1e-2),
}


def interpreter() -> str:
    found = os.environ.get("JQSERVE_PEERS_PYTHON") or str(ROOT / ".venv-peers" / "bin" / "python")
    if not Path(found).exists():
        pytest.skip("no interpreter with the peers' packages: set JQSERVE_PEERS_PYTHON")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "flags", "bound"), CASES.values(), ids=CASES.keys())
def test_the_peers_read_it(tmp_path: Path, reader: str, flags: dict[str, Any], bound: float) -> None:
    python = interpreter()
    base = tiny.make(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # GPTQModel will not load without one
        shutil.copy(ROOT / "jqserve" / "demo" / "model" / name, base.path)
    options = Options(**flags)
    quantize(base.path, tmp_path / "out", options, SAMPLES if options.calibrated else None)
    np.save(tmp_path / "ids.npy", IDS)
    command = [python, str(ROOT / "tests" / "quantize" / "peer_logits.py"), reader]
    command += [str(tmp_path / name) for name in ("out", "ids.npy", "logits.npy")]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JAX_PLATFORMS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    if reader == "transformers" and "weight_zero_point" in done.stderr and "MISMATCH" in done.stderr:
        # seen with transformers 5.24 and compressed-tensors 0.20, on LLM Compressor's own ct-w4a16-asym-g128 as well
        pytest.xfail("these versions do not load packed zero points, whoever wrote them")
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(tmp_path / "logits.npy")
    inputs: Any = "none" if flags.get("format") == "fp8" else "config"  # transformers dequantizes blocks, and no more
    model, params = jqserve.load(tmp_path / "out", dtype="float32", activations=inputs)
    for layer in params["layers"].values():  # transformers leaves keys and values as they are unless they are cached
        layer["attn"] = {name: value for name, value in layer["attn"].items() if name not in ("k_scale", "v_scale")}
    ours = np.asarray(model(params, IDS))
    assert np.linalg.norm(ours - theirs) < bound * np.linalg.norm(ours)
