"""`--quantization awq` and `gptq`: the same bytes as `jqserve quantize` followed by loading, and what is refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jqserve import library
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.checkpoint.forecast import forecast
from jqserve.checkpoint.loaded import flat_leaves
from jqserve.checkpoint.opening import open_model
from jqserve.engine.calibrated import open_asked
from jqserve.errors import CheckpointError, JqserveError, RequestError, UnsupportedError
from jqserve.quantize.job import quantize
from jqserve.quantize.layer import LayerQuantizer
from jqserve.quantize.options import Options
from tests.checkpoint import configs as c
from tests.checkpoint import tiny

SEQLEN = tiny.CONFIG["max_position_embeddings"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    """With biases, a head of its own, and two layers."""
    made = tiny.make(
        tmp_path_factory.mktemp("base"),
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        tie_word_embeddings=False,
    )
    rng = np.random.default_rng(1)
    for name, weight in made.weights.items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            made.tensors[f"{name}.bias"] = rng.normal(0, 0.1, len(weight)).astype(made.tensors[f"{name}.weight"].dtype)
    return made.save()


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.integers(0, tiny.CONFIG["vocab_size"], 2 * SEQLEN + 3).astype(np.int32))
    return path


def leaves(params: dict[str, Any]) -> dict[str, bytes]:
    """Every array of a tree: qvalues, scales, zeros, norms, biases."""
    return {
        f"{path}[{i}]": np.asarray(leaf).tobytes()
        for path, value in flat_leaves(params)
        for i, leaf in enumerate(jax.tree.leaves(value))
    }


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_the_bytes_of_quantize_and_load(
    scheme: str, base: tiny.Tiny, ids: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source, rest = open_asked(base.path, scheme, str(ids))
    assert rest is None
    found = load(source, device_put=keep_on_host)
    samples = np.load(ids)[: 2 * SEQLEN].reshape(2, SEQLEN)
    quantize(base.path, tmp_path / "out", Options(scheme), samples)
    wanted = load(tmp_path / "out", device_put=keep_on_host)
    assert leaves(found.params) == leaves(wanted.params)
    assert found.plan.rows == wanted.plan.rows and found.plan.method == scheme
    assert found.config == wanted.config
    text = f"calibrated on 2 rows of {SEQLEN} tokens of the text of {ids}"
    assert text in found.plan.notes[0] and text in caplog.text and "takes minutes" in caplog.text
    assert re.search(r"calibrated \d+ layers in \d+ s", caplog.text)


def test_calibrating_has_the_device_to_itself(base: tiny.Tiny, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is placed before every layer is quantized, nothing that quantizing needed is left on the device then, and
    what it made waits in numpy's memory."""
    others = {id(array) for array in jax.live_arrays()}
    left: list[jax.Array] = []
    kinds: set[type] = set()
    run = LayerQuantizer.run

    def watched(self: LayerQuantizer, *args: Any) -> Any:
        done = run(self, *args)
        kinds.update(type(array) for array in done.tensors.values())
        return done

    def put(weight: Any) -> Any:
        if not seen[2:]:
            left.extend(array for array in jax.live_arrays() if id(array) not in others)
        return keep_on_host(weight)

    monkeypatch.setattr(LayerQuantizer, "run", watched)
    seen: list[tuple[int, int, str]] = []

    def progress(*now: Any) -> None:
        seen.append(now)

    source, _ = open_asked(base.path, "gptq", str(ids), progress=progress)
    load(source, device_put=put, progress=progress)
    modules = seen[2:]
    assert seen[:2] == [(1, 2, "layer 0 quantized"), (2, 2, "layer 1 quantized")]
    assert modules[0][2] == "embed.weight" and [done for done, *_ in modules] == list(range(1, len(modules) + 1))
    assert kinds == {np.ndarray} and not left


def test_the_plan_needs_no_tensor(base: tiny.Tiny, ids: Path) -> None:
    source, _ = open_asked(base.path, "awq", str(ids), headers_alone=True)
    found = forecast(open_model(source, None, "config", None))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="headers alone"):
        source.read("model.layers.0.self_attn.q_proj.qweight")  # type: ignore[union-attr]
    source.close()  # type: ignore[union-attr]
    loaded = load(open_asked(base.path, "awq", str(ids))[0], device_put=keep_on_host)
    assert found.plan.rows == loaded.plan.rows
    layers = sum(row.bytes for row in found.plan.rows if row.path.startswith("layers."))
    stream = 512 * SEQLEN * tiny.CONFIG["hidden_size"] * 2
    assert layers <= found.working[1] - 2 * stream < 1.1 * layers  # norms, and the file's own form of zeros
    device, host = found.working
    assert found.peak_bytes(10 * device) == (10 * device + found.largest, 2 * found.largest + host)
    assert found.peak_bytes(0)[0] == max(device, found.largest), "calibrating comes before anything is loaded"
    assert "calibrated on the text of" in found.plan.notes[0]


def test_the_built_in_text(base: tiny.Tiny, fixtures_dir: Path) -> None:
    """By the library, with a real tokenizer: GPTQ on the little it has still beats rounding, on text that it has not
    seen (0.713 against 0.745)."""
    path = fixtures_dir / "base-bf16"
    tokens = np.fromfile(fixtures_dir / "valid.bin", np.uint16)[:512].astype(np.int32)
    model, params = library.load(path, dtype="float32")
    reference = library.logits(model, params, tokens)
    model, params = library.load(path, dtype="float32", quantization="gptq")
    assert "a built-in text, which is small" in model.plan.notes[0]
    found = library.logits(model, params, tokens)
    rounded = library.logits(*library.load(path, dtype="float32", quantization="int4"), tokens)
    assert np.square(found - reference).mean() < np.square(rounded - reference).mean()


def test_refusals(base: tiny.Tiny, ids: Path, tmp_path: Path) -> None:
    empty, short, folder = tmp_path / "empty.npy", tmp_path / "short.npy", tmp_path / "folder"
    np.save(empty, np.zeros(0, np.int32))
    np.save(short, np.zeros(SEQLEN - 1, np.int32))
    folder.mkdir()
    for file, said in (
        (tmp_path / "none.txt", "no such file"),
        (empty, "expected ids"),
        (short, f"holds {SEQLEN - 1} tokens, fewer than one row of {SEQLEN}: a calibration text must fill one"),
        (folder, "has no file that ends in"),
    ):
        with pytest.raises(RequestError, match=re.escape(said)) as caught:
            open_asked(base.path, "awq", str(file))
        assert str(file) in str(caught.value) and "--calibration" in str(caught.value)
    with pytest.raises(RequestError, match="no such file"):
        open_asked(base.path, "awq", str(tmp_path / "none.txt"), headers_alone=True)
    with pytest.raises(RequestError, match="belongs to --quantization awq or gptq, not to fp8"):
        open_asked(base.path, "fp8", str(ids))
    with pytest.raises(JqserveError, match="tokenizer"):
        open_asked(base.path, "awq", None)  # text, and the fixture has no tokenizer
    quantized = tiny.make(tmp_path / "awq", tiny.awq(128), c.awq(128))
    assert open_asked(quantized.path, "awq") == (quantized.path, "awq")
    with pytest.raises(RequestError, match="nothing to calibrate"):
        open_asked(quantized.path, "awq", str(ids))
    with pytest.raises(UnsupportedError, match="jqserve quantize"):
        load(base.path, quantization="awq")  # who did not open it so: --load-format dummy, a converted directory


def test_groups_that_do_not_fit_name_the_command_that_chooses_others(tmp_path: Path) -> None:
    """The server has no --group-size: the flags of `jqserve quantize` would be no advice."""
    made = tiny.make(tmp_path, hidden_size=192, intermediate_size=320, num_attention_heads=6)
    for name, scheme in (("gptq_marlin", "gptq"), ("awq", "awq")):
        command = rf"`jqserve quantize --model-path \S+ --scheme {scheme} --group-size 64 "
        with pytest.raises(UnsupportedError, match=rf"--quantization {name}: .*q_proj has 192 in features; {command}"):
            open_asked(made.path, name, headers_alone=True)
