"""vLLM's figures are read as what they are, and a ratio is printed only beside ours of the same call."""

from __future__ import annotations

import json

from bench import decode, peer_vllm, readme_serving, serve

SAID = """INFO loading
{"peer": "vllm", "scheme": "ct4", "startup_s": 51.0, "kernel": "MacheteLinearKernel", "param_GB": 5.7}
{"peer": "vllm0.25.1", "scheme": "ct4", "n": 256, "inp": 1000, "out": 1000, "seconds": 28.3, "out_tok_s": 9043.4}
{"peer": "vllm0.25.1", "scheme": "ct4", "batch": 64, "ctx": 1024, "out": 112, "tok_s_decode": 8600.0, "tpot_ms": 7.4}
"""


def test_its_lines_become_rows_that_the_benches_look_up(tmp_path):
    rows = peer_vllm.rows_of("w4a16", SAID)
    assert rows[0]["applied"]["kernel"] == "MacheteLinearKernel"
    path = str(tmp_path / "peer_vllm.json")
    (tmp_path / "peer_vllm.json").write_text(
        json.dumps({"rows": [*rows, {"scheme": "fp8", "failed": "exit status 1"}]})
    )
    assert peer_vllm.decode_rates(path) == {("w4a16", 64, 1024): 8600.0}
    assert decode.beside("w4a16", 64, 1024, "bfloat16", path)["vllm"] == 8600.0
    assert decode.beside("w4a16", 1, 1024, "bfloat16", path) == {"vllm": 271, "aim": 420}
    assert decode.beside("w4a16", 64, 1024, "float8_e4m3fn", path) == {"vllm": None, "aim": None}
    assert serve.peers("w4a16", "random:1000/1000", path) == {"vllm": 9043, "beside": True}
    assert serve.peers("fp8", "random:1000/1000", path) == {"vllm": 11634, "trtllm_fp8_kv": 17744}


def test_a_ratio_needs_the_same_run():
    ours = {"tokens_per_second": 12000.0, "vllm": 8000}
    assert readme_serving._peer(ours) == "8,000"
    assert readme_serving._peer(ours | {"vllm_beside": True}) == "8,000: 1.50 x"
