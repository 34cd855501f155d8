"""`jqserve convert`: the stored form gives the same tree, heeds the same flags, and notices every change."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jqserve.checkpoint import manifest, store
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.checkpoint.loaded import flat_leaves
from jqserve.checkpoint.quant_config import NOT_QUANTIZED
from jqserve.checkpoint.store_forecast import forecast_store
from jqserve.errors import CheckpointError, UnsupportedError
from tests.checkpoint import configs as c
from tests.checkpoint import tiny

CASES: dict[str, tuple[tiny.Maker, dict[str, Any] | None]] = {
    "bf16": (tiny.dense, None),
    "gptq act-order, asym": (tiny.gptq(4, 32, False, desc_act=True), c.gptq(4, 32, False, desc_act=True)),
    "fp8 static": (
        tiny.eight(shape="tensor", static=True),
        c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float", static=True)),
    ),
    "int8": (tiny.eight("int"), c.compressed("int-quantized", c.weights(8, "int", "channel"), c.inputs("int"))),
}


def same(a: Any, b: Any) -> None:
    """Equal trees: structure (specs are part of it), dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def on_host(path: Path, **options: Any) -> Any:
    return load(str(path), device_put=keep_on_host, **options)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "hf", *CASES[case], tie_word_embeddings=False)
    (made.path / "tokenizer.json").write_text("{}")
    plan = store.convert(made.path, tmp_path / "out")
    stored, original = on_host(tmp_path / "out"), on_host(made.path)
    same(stored.params, original.params)
    assert stored.config == original.config and stored.plan == original.plan == plan
    assert (tmp_path / "out" / "tokenizer.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))
    without = on_host(tmp_path / "out", activations="none")
    same(without.params, on_host(made.path, activations="none").params)
    assert without.plan == on_host(made.path, activations="none").plan


def test_flags_on_a_stored_dense_model(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "hf")
    store.convert(made.path, tmp_path / "out")
    for options in ({"dtype": "float32"}, {"quantization": "fp8"}):
        stored, original = on_host(tmp_path / "out", **options), on_host(made.path, **options)
        same(stored.params, original.params)
        assert stored.plan == original.plan and stored.config == original.config
    store.convert(made.path, tmp_path / "fp8", quantization="fp8", dtype="float16")
    same(on_host(tmp_path / "fp8").params, on_host(made.path, quantization="fp8", dtype="float16").params)


def test_a_model_quantized_while_it_was_converted_is_quantized(tmp_path: Path) -> None:
    """Its checkpoint was not: another flag would be believed to have been heeded, and the plan called it dense."""
    made = tiny.make(tmp_path / "hf", tie_word_embeddings=False)
    store.convert(made.path, tmp_path / "out", quantization="int4")
    repeated = on_host(tmp_path / "out", quantization="int4")
    assert repeated.plan.method == "online: int4" and "is that already" in repeated.plan.notes[0]
    _, forecast = forecast_store(tmp_path / "out", None, "config", None)
    assert NOT_QUANTIZED not in forecast.unquantized.values() and "lm_head" in forecast.unquantized
    for name in ("fp8", "awq", "torchao:int4wo-128", "int4-32"):
        refused(tmp_path / "out", name, "quantized already: online: uint4, per channel; online: uint4, groups of 128")


def test_a_scheme_that_fits_nothing_of_a_stored_model_is_refused(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "hf", hidden_size=96, intermediate_size=160)
    store.convert(made.path, tmp_path / "out")
    refused(tmp_path / "out", "bitsandbytes", "none of the checkpoint's 8 Linears fits")


def refused(path: Path, quantization: str, words: str) -> None:
    """By loading and by the plan."""
    with pytest.raises(UnsupportedError, match=words):
        on_host(path, quantization=quantization)
    with pytest.raises(UnsupportedError, match=words):
        forecast_store(path, None, "config", quantization)


def test_demo_model(demo_dir: Path, tmp_path: Path) -> None:
    store.convert(demo_dir, tmp_path / "out")
    same(on_host(tmp_path / "out").params, on_host(demo_dir).params)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    made = tiny.make(path / "hf", tiny.gptq(4, 32, False, desc_act=True), c.gptq(4, 32, False, desc_act=True))
    store.convert(made.path, path / "out")
    return path / "out"


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the manifest's body and signs it anew: what a wrong program could write."""

    def apply(path: Path) -> None:
        body = manifest.read(path)
        change(body)
        manifest.write(path, body)

    return apply


def unsigned(path: Path) -> None:
    file = path / manifest.NAME
    file.write_text(file.read_text().replace('"group_shape"', '"group_shape" ', 1).replace("32", "64", 1))


def flip(path: Path) -> None:
    """One bit in the largest data file of a layer."""
    data = max((path / "arrays" / "layers.1").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def leaf(body: dict[str, Any]) -> dict[str, Any]:
    return body["sections"]["layers.1"]["layers.1.mlp.down.weight"]


def swap_sections(path: Path) -> None:
    arrays = path / "arrays"
    (arrays / "layers.0").rename(arrays / "x")
    (arrays / "layers.1").rename(arrays / "layers.0")
    (arrays / "x").rename(arrays / "layers.1")


def other_theta(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))


def other_arrays(path: Path) -> None:
    """A section of another model: found by its metadata, before memory for it is taken."""
    made = tiny.make(path / "hf", tiny.gptq(4, 32, False, desc_act=True), c.gptq(4, 32, False), intermediate_size=128)
    store.convert(made.path, path / "other")
    shutil.rmtree(path / "arrays" / "layers.0")
    shutil.move(path / "other" / "arrays" / "layers.0", path / "arrays" / "layers.0")


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "manifest edited": (unsigned, ("SHA-256",)),
    "manifest is not JSON": (lambda p: (p / manifest.NAME).write_text("{") and None, ("JSON",)),
    "manifest of something else": (lambda p: (p / manifest.NAME).write_text("{}") and None, ("format",)),
    "a wrong group": (edited(lambda b: leaf(b)["spec"].update(group_shape=[1, 64])), ("down", "canonical")),
    "a wrong zero": (edited(lambda b: leaf(b)["spec"].update(zero="none")), ("down", "canonical")),
    "a wrong type": (edited(lambda b: leaf(b)["spec"].update(qtype="int8")), ("down", "canonical")),
    "an unknown type": (edited(lambda b: leaf(b)["spec"].update(qtype="int3")), ("int3",)),
    "a wrong dtype": (edited(lambda b: leaf(b)["arrays"]["scale"].update(dtype="bfloat16")), ("scale", "float16")),
    "a leaf less": (
        edited(lambda b: b["sections"]["layers.1"].pop("layers.1.mlp.down.weight")),
        ("layers.1.mlp.down.weight", "missing"),
    ),
    "a leaf more": (edited(lambda b: b["sections"]["embed"].update(x=leaf(b))), ("belong to no module", "x")),
    "another model": (edited(lambda b: b["config"].update(hidden_size=64)), ("config.json",)),
    "a layer less": (edited(lambda b: b["config"].update(layers=1)), ("config.json",)),
    "a field less": (edited(lambda b: b["config"].pop("heads")), ("heads",)),
    "a section elsewhere": (
        edited(lambda b: b["sections"].update({"../../x": b["sections"].pop("layers.0")})),
        ("../../x", "does not belong there"),
    ),
    "a number that is text": (edited(lambda b: b["config"].update(layers="2")), ("config.json",)),
    "an unknown activation": (edited(lambda b: leaf(b)["spec"]["activation"].update(kind="odd")), ("odd",)),
    "a shape without end": (edited(lambda b: b["config"].update(vocab_size=1 << 40)), ("config.json",)),
    "config.json edited": (other_theta, ("config.json",)),
    "arrays of another size": (other_arrays, ("layers.0.mlp.gate_up.weight:qvalue", "256, 64", "512, 64")),
    "a flipped bit": (flip, ("layers.1", "convert")),
    "sections swapped": (swap_sections, ("layers.0", "convert")),
    "a section less": (lambda p: shutil.rmtree(p / "arrays" / "layers.0"), ("layers.0", "convert")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, written: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[case]
    shutil.copytree(written, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(CheckpointError) as caught:
        on_host(tmp_path / "copy")
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_a_newer_version_is_refused(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "copy")
    file = tmp_path / "copy" / manifest.NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(UnsupportedError, match="version 2 found, 1 is supported"):
        on_host(tmp_path / "copy")


def test_convert_does_not_overwrite(written: Path, demo_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="not an empty directory"):
        store.convert(demo_dir, written)


def test_an_unfinished_conversion_has_no_manifest(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "hf")

    def stop(done: int, total: int, path: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.convert(made.path, tmp_path / "out", progress=stop)
    assert not store.is_store(tmp_path / "out")
    store.convert(made.path, tmp_path / "out")  # which the same command completes
    assert store.is_store(tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = tiny.make(tmp_path / "hf")
    save = ocp.PyTreeCheckpointer.save

    def full(self: Any, where: Path, *arguments: Any, **options: Any) -> None:
        save(self, where, *arguments, **options)
        if where.name == "layers.0":
            logging.getLogger("absl").error("as Orbax's threads say it, with their tracebacks")
            raise ValueError("RESOURCE_EXHAUSTED: Error writing\nNo space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", full)
    with pytest.raises(CheckpointError, match=r"out/arrays/layers\.0: could not be written: No space left on device$"):
        store.convert(made.path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and "threads say it" not in capfd.readouterr().err


def test_flat_leaves_names_every_leaf(written: Path) -> None:
    sections = manifest.read(written)["sections"]
    names = [name for leaves in sections.values() for name in leaves]
    assert [name for name, _ in flat_leaves(on_host(written).params)] == names


def test_command_line(demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jqserve.cli.main import main

    out = tmp_path / "out"
    assert main(["convert", "--model-path", str(demo_dir), "--out", str(out)]) == 0
    assert "load plan: gptq" in capsys.readouterr().out and store.is_store(out)
    assert main(["convert", "--model-path", str(demo_dir), "--out", str(out)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert main(["convert", "--model-path", str(out), "--out", str(tmp_path / "again")]) == 2
    assert "`jqserve convert` wrote it" in capsys.readouterr().err
