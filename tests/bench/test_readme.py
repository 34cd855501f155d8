"""README's tables come from the result files, and nothing else stands between their markers."""

from __future__ import annotations

import json

from bench import readme, readme_kernels, readme_table


def test_readme_is_rendered():
    text = readme.README.read_text()
    assert set(readme.TABLES) <= {line[11:-4] for line in text.splitlines() if line.startswith("<!-- bench:")}
    assert readme.rendered(text) == text, "run: python -m bench.readme"


def test_kernels_beside_the_best_peer(tmp_path, monkeypatch):
    frame = dict(device="NVIDIA H200", versions={"jax": "1"}, commit="abc", date="2026-01-01T00:00:00", command="x")
    sums = [
        dict(op="w4a16", m=1, us=49.6),
        dict(op="machete", m=1, us=85.0),
        dict(op="marlin_w4a16", m=1, us=71.4),
        dict(op="fp8_row", m=16, us=66.4, kernel_us=61.2),
    ]
    rows = [
        dict(op="prefill_attention", context=4096, kind="full", kv="bfloat16", us=1.0, tflops=690, ok=True),
        dict(op="peer", peer="cudnn", kind="full", us=1.0, tflops=682, ok=True),
        dict(op="peer", peer="fa3_paged", kind="full", us=1.0, tflops=700, ok=False),
        dict(op="decode_attention", rows=64, context=1024, kv="bfloat16", us=70.0, ok=True),
        dict(op="peer", peer="fa3_paged16", rows=64, context=1024, us=81.8, ok=True),
        dict(key="hung", failed="hung; killed"),
    ]
    result = {**frame, "sums": sums, "rows": rows, "hbm_bytes_per_second": 4.6e12}
    (tmp_path / "kernels.json").write_text(json.dumps(result))
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    text = readme_kernels.kernels()
    assert "| 4-bit weights, group 128 | 50 (71 marlin w4a16) | - |" in text
    assert "| fp8 x fp8, per token x per channel | - | 66 / 61 |" in text
    assert "| prefill 4,096, full, bf16 pages | 690 TFLOP/s | 682 cudnn |" in text
    assert "| decode 64 x 1,024, bf16 pages | 70.0 us | 81.8 fa3 paged16 |" in text
    assert "4.60 TB/s" in text
