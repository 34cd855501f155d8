"""Every fixture against the logits that its own tool's dequantization gives: what `jqserve logits` prints is right.

wdq: weights dequantized by the peer in fp32, then an fp32 transformers model. qdq: activations quantized as well.
The bounds are issue 3's; the references are stored as fp16, which alone accounts for 4e-4 of the largest logit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jqserve.cli.main import main

WDQ_BOUND = 2e-3  # of the largest |logit|
QDQ_BOUND = 1e-2
QDQ_KL = 2e-4  # nats, mean over positions

ACTIVATION_QUANTIZED = ("ct-fp8-dynamic", "ct-fp8-static", "ct-w8a8-int8", "arch-mistral-sw-ct-fp8-dynamic")
FIXTURES = (
    "base-bf16",
    "awq-4bit-g128",
    "gptq-4bit-g128",
    "gptq-4bit-g128-desc-act",
    "gptq-4bit-g128-asym-v1",
    "gptq-8bit-g128",
    "gptq-dynamic",
    "ct-w4a16-g128",
    "ct-w4a16-asym-g128",
    "ctold-w4a16-actorder-group",
    "ct-fp8-kv",  # by its weights; its KV scheme comes later
    "arch-qwen2-gptq",
    "arch-qwen3-ct-w4a16",
    *ACTIVATION_QUANTIZED,
)
REFUSED = {  # until issue 6: (a word of the scheme that the message names)
    "fp8-block": "block",
    "bnb-nf4-double": "bitsandbytes",
    "gguf-q4_0": "gguf",
    "torchao-int8dq": "torchao",
}


def jqserve_logits(model: Path, tmp_path: Path, *options: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(reference, what `jqserve logits` wrote) for the fixture's four prompts, in float32 with 16 greedy tokens."""
    with np.load(model / "ref.npz") as archive:
        reference = {name: archive[name] for name in archive.files}
    prompts = {f"p{i}": reference[f"prompt_{i}"] for i in range(4)}
    np.savez(tmp_path / "in.npz", **prompts)
    command = ["logits", "--model-path", str(model), "--input-ids", str(tmp_path / "in.npz")]
    command += ["--out", str(tmp_path / "out.npz"), "--dtype", "float32", "--greedy", "16", *options]
    assert main(["--debug", *command]) == 0
    with np.load(tmp_path / "out.npz") as archive:
        return reference, {name: archive[name] for name in archive.files}


def distance(reference: dict, got: dict, kind: str) -> tuple[float, float]:
    """(largest difference over the largest |logit|, mean KL(reference || got) in nats), over all prompts."""
    expected = np.concatenate([reference[f"logits_{kind}_{i}"] for i in range(4)]).astype(np.float64)
    ours = np.concatenate([got[f"p{i}"] for i in range(4)]).astype(np.float64)
    assert ours.shape == expected.shape

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(ours)
    return float(np.abs(ours - expected).max() / np.abs(expected).max()), float((np.exp(p) * (p - q)).sum(-1).mean())


def check_greedy(reference: dict, got: dict, kind: str, bound: float) -> None:
    """Equal up to the first step whose reference margin is below twice the bound; returns nothing, asserts."""
    for i in range(4):
        largest = np.abs(reference[f"logits_{kind}_{i}"].astype(np.float32)).max()
        close = np.flatnonzero(reference[f"margin_{kind}_{i}"] < 2 * bound * largest)
        sure = int(close[0]) if close.size else 16
        assert got[f"p{i}_greedy"].dtype == np.int32 and got[f"p{i}"].dtype == np.float32
        assert got[f"p{i}_greedy"][:sure].tolist() == reference[f"greedy_{kind}_{i}"][:sure].tolist()


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_as_the_peer_dequantizes_them(name: str, fixtures_dir: Path, tmp_path: Path) -> None:
    reference, got = jqserve_logits(fixtures_dir / name, tmp_path, "--activations", "none")
    difference, _ = distance(reference, got, "wdq")
    assert difference <= WDQ_BOUND
    check_greedy(reference, got, "wdq", WDQ_BOUND)
    if name in ACTIVATION_QUANTIZED:
        # The other half: without the activation quantization the qdq bounds must not hold, or they would test nothing.
        left_out, kl = distance(reference, got, "qdq")
        assert left_out > QDQ_BOUND and kl > QDQ_KL


@pytest.mark.parametrize("name", ACTIVATION_QUANTIZED)
def test_activations_as_the_peer_quantizes_them(name: str, fixtures_dir: Path, tmp_path: Path) -> None:
    reference, got = jqserve_logits(fixtures_dir / name, tmp_path)
    difference, kl = distance(reference, got, "qdq")
    assert difference <= QDQ_BOUND and kl <= QDQ_KL, (difference, kl)
    check_greedy(reference, got, "qdq", QDQ_BOUND)


@pytest.mark.parametrize("name", REFUSED)
def test_formats_to_come_are_refused_by_name(
    name: str, fixtures_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", p0=np.arange(4, dtype=np.int32))
    command = ["logits", "--model-path", str(fixtures_dir / name), "--input-ids", str(tmp_path / "in.npz")]
    assert main([*command, "--out", str(tmp_path / "out.npz")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and REFUSED[name] in message.lower()
    assert not (tmp_path / "out.npz").exists()
