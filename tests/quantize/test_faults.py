"""Runs that end badly: what is left never loads, and what goes on from there ends in the same bytes."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jqserve
from jqserve.cli.main import main
from jqserve.quantize import files
from jqserve.quantize.job import Progress, quantize
from jqserve.quantize.options import Options
from tests.checkpoint import tiny

SAMPLES = np.random.default_rng(0).integers(0, tiny.CONFIG["vocab_size"], (6, 32)).astype(np.int32)
GPTQ = Options("gptq", group_size=64, kv_cache="fp8")
AWQ = Options("awq", group_size=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("base"), num_hidden_layers=3).path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def loadable(folder: Path) -> bool:
    try:
        jqserve.load(folder)
    except jqserve.JqserveError:
        return False
    return True


class Stopped(Exception):
    pass


def stopping(at: int) -> Progress:
    """Raises when layer `at` is done."""

    def progress(done: int, total: int, rows: Any, kept: bool) -> None:
        if done == at:
            raise Stopped

    return progress


def noting(kept: list[bool]) -> Progress:
    """Notes which layers an earlier run had done."""

    def progress(done: int, total: int, rows: Any, was_kept: bool) -> None:
        kept.append(was_kept)

    return progress


@pytest.mark.parametrize("options", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(base: Path, tmp_path: Path, options: Options) -> None:
    quantize(base, tmp_path / "whole", options, SAMPLES, chunk_tokens=64)
    for stop_after in (1, 2):
        out = tmp_path / f"stopped{stop_after}"
        kept: list[bool] = []

        with pytest.raises(Stopped):
            quantize(base, out, options, SAMPLES, chunk_tokens=64, progress=stopping(stop_after))
        assert not out.exists()
        left = tmp_path / f".stopped{stop_after}.quantizing"
        assert left.is_dir() and not loadable(left)
        quantize(base, out, options, SAMPLES, chunk_tokens=64, progress=noting(kept))
        assert kept == [True] * stop_after + [False] * (3 - stop_after)
        assert content(out) == content(tmp_path / "whole")
        assert not left.exists()


def test_a_damaged_piece_is_made_again(base: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "whole", GPTQ, SAMPLES)
    with pytest.raises(Stopped):
        quantize(base, tmp_path / "out", GPTQ, SAMPLES, progress=stopping(2))
    piece = tmp_path / ".out.quantizing" / "piece-00001.tensors"
    damaged = bytearray(piece.read_bytes())
    damaged[-5] ^= 1
    piece.write_bytes(damaged)
    kept: list[bool] = []
    quantize(base, tmp_path / "out", GPTQ, SAMPLES, progress=noting(kept))
    assert kept == [False, True, False]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("change", [("weight_db", "weight_dB"), ('"weight_db": 1', '"weight_db": 2')])
def test_a_damaged_report_is_made_again(base: Path, tmp_path: Path, change: tuple[str, str]) -> None:
    """The tensors' checksum says nothing about it, and it goes into the output."""
    options = Options("w4a16")
    quantize(base, tmp_path / "whole", options)
    with pytest.raises(Stopped):
        quantize(base, tmp_path / "out", options, progress=stopping(2))
    about = tmp_path / ".out.quantizing" / "piece-00001.json"
    assert change[0] in about.read_text()
    about.write_text(about.read_text().replace(*change))
    kept: list[bool] = []
    quantize(base, tmp_path / "out", options, progress=noting(kept))
    assert kept == [False, True, False]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_another_job_is_not_continued(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        quantize(base, tmp_path / "out", GPTQ, SAMPLES, progress=stopping(1))
    with pytest.raises(jqserve.JqserveError, match=r"unfinished run that differs in: calibration.*--restart"):
        quantize(base, tmp_path / "out", GPTQ, SAMPLES[::-1])
    with pytest.raises(jqserve.JqserveError, match="differs in: options"):
        quantize(base, tmp_path / "out", Options("gptq", group_size=32, kv_cache="fp8"), SAMPLES)
    quantize(base, tmp_path / "out", GPTQ, SAMPLES[::-1], restart=True)
    assert loadable(tmp_path / "out")
    with pytest.raises(jqserve.JqserveError, match="exists and is not an empty directory"):
        quantize(base, tmp_path / "out", GPTQ, SAMPLES)


@pytest.mark.slow
def test_killed_at_random_points(base: Path, tmp_path: Path) -> None:
    """SIGKILL, with whatever was being written. Every attempt gets a little further; the last one ends."""
    np.save(tmp_path / "ids.npy", SAMPLES)
    command = [sys.executable, "-m", "jqserve.cli.main", "quantize", "--model-path", str(base), "--scheme", "w4a16"]
    command += ["--kv-cache", "fp8", "--calibration", str(tmp_path / "ids.npy"), "--seqlen", "32"]
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True, timeout=250)
    assert whole.returncode == 0, whole.stderr
    rng, out = random.Random(7), tmp_path / "out"
    for _ in range(3):
        process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        watched = tmp_path / ".out.quantizing"
        wanted = len(list(watched.glob("*.json"))) + rng.randint(1, 2)
        until = time.monotonic() + 120
        while process.poll() is None and len(list(watched.glob("*.json"))) < wanted and time.monotonic() < until:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            break
        assert not loadable(watched)
    if not out.exists():
        done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_full_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """At the nth file: a clear error, nothing that loads, and room again is all that a second run needs."""
    count = 0
    real = os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += not os.path.isdir(f"/proc/self/fd/{handle}")
        if count == failing * 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(jqserve.JqserveError, match="No space left on device"):
        quantize(base, tmp_path / "out", Options("w8a16"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(files.os, "fsync", real)
    quantize(base, tmp_path / "out", Options("w8a16"))
    assert loadable(tmp_path / "out")


def test_a_disk_that_was_full_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            jqserve.JqserveError, match=r"\.out\.quantizing: the directory in which a run.*No space left"
        ):
            quantize(base, tmp_path / "out", Options("w8a16"))
    (tmp_path / "file").touch()
    with pytest.raises(jqserve.JqserveError, match=r"beside --out, could not be written: File exists"):
        quantize(base, tmp_path / "file" / "out", Options("w8a16"))
    quantize(base, tmp_path / "out", Options("w8a16"))


def test_the_full_disk_names_the_layer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jqserve.quantize import workplace

    real = workplace.write_safetensors

    def full(path: Path, tensors: Any) -> str:
        if path.name == "piece-00002.tensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, tensors)

    monkeypatch.setattr(workplace, "write_safetensors", full)
    with pytest.raises(jqserve.JqserveError, match=r"model\.layers\.1 could not be written: No space.*repeat the comm"):
        quantize(base, tmp_path / "out", Options("w8a16"))


def test_weights_that_are_not_numbers(base: Path, tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "nan")
    made.tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    made.save()
    with pytest.raises(jqserve.JqserveError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: has values that are not"):
        quantize(tmp_path / "nan", tmp_path / "out", Options("w4a16"))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_all_zero(base: Path, tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "zero")
    made.tensors["model.layers.0.mlp.gate_proj.weight"][:] = 0
    made.save()
    for options in (Options("w4a16"), GPTQ, AWQ, Options("w8a8-int8", smoothquant=0.5), Options("fp8-static")):
        name = f"{options.scheme}{options.smoothquant}"
        rows = quantize(tmp_path / "zero", tmp_path / name, options, SAMPLES)
        notes = {row.name: row.note for row in rows}
        assert "all weights are zero" in notes["model.layers.0.mlp.gate_proj"]
        # down's input is silu(0) * up = 0 on every sample: nothing to weigh its errors by
        if options.scheme == "gptq":
            assert notes["model.layers.0.mlp.down_proj"] == "no input was ever active: rounded to nearest"
        _, params = jqserve.load(tmp_path / name, dtype="float32", activations="none", layout="canonical")
        gate = np.asarray(jqserve.dequantize(params["layers"]["0"]["mlp"]["gate_up"]["weight"]))[:256]
        assert np.isfinite(gate).all() and not gate.any()


def test_activations_that_overflow(tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "large")
    made.tensors["model.layers.0.mlp.down_proj.weight"] = (
        made.tensors["model.layers.0.mlp.down_proj.weight"].astype(np.float32) * 1e6
    ).astype(made.tensors["model.norm.weight"].dtype)
    made.save()
    with pytest.raises(jqserve.JqserveError, match=r"model\.layers\.\d: the input of \w+ is not finite"):
        quantize(
            tmp_path / "large",
            tmp_path / "out",
            dataclasses.replace(GPTQ, format="compressed-tensors"),
            SAMPLES,
            dtype="float16",
        )


@pytest.mark.parametrize("options", [Options("w4a16", format="gptq"), AWQ, GPTQ], ids=["rtn", "awq", "gptq"])
def test_a_scale_that_float16_cannot_hold(tmp_path: Path, options: Options) -> None:
    """It was written as infinity, in a file that nothing loads, or a layer later the weights were called damaged."""
    made = tiny.make(tmp_path / "base")
    made.tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = 3e6
    with pytest.raises(jqserve.JqserveError, match=r"^model\.layers\.0\.mlp\.down_proj: .* beyond float16"):
        quantize(made.save().path, tmp_path / "out", options, SAMPLES)
    quantize(made.path, tmp_path / "ct", Options("w4a16"))
    assert loadable(tmp_path / "ct")


def test_the_working_directory_as_output(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quantize(base, ".", Options("w4a16"))
    assert loadable(tmp_path / "here") and [path.name for path in tmp_path.iterdir()] == ["here"]


def test_what_is_no_hugging_face_directory(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "jqserve.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name, what in (("store", "was written by `jqserve convert`"), ("model.gguf", "is a GGUF file")):
        with pytest.raises(jqserve.JqserveError, match=f"{what}; give the unquantized Hugging Face directory"):
            quantize(tmp_path / name, tmp_path / "out", Options("w4a16"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scheme", "w4a16", "--damp", "0.1"], "--damp: belongs to GPTQ, which --scheme w4a16"),
        (["--scheme", "awq", "--damp", "0.1"], "--damp: belongs to GPTQ, which --scheme awq"),
        (["--scheme", "gptq", "--no-clip"], "--no-clip: belongs to AWQ"),
        (["--scheme", "gptq", "--search-tokens", "64"], "--search-tokens: belongs to AWQ"),
        (["--scheme", "w4a16", "--calibration", "x.txt"], "--calibration: --scheme w4a16 as asked for here takes no"),
        (["--scheme", "w8a8-int8", "--samples", "64"], "--samples: --scheme w8a8-int8 as asked for here takes no data"),
        (["--scheme", "w4a16", "--seqlen", "64"], "--seqlen: --scheme w4a16 as asked for here takes no data"),
        (["--scheme", "w4a16", "--seed", "0"], "--seed: --scheme w4a16 as asked for here takes no data"),
        (["--scheme", "w4a16", "--dtype", "float16"], "--dtype: --scheme w4a16 as asked for here takes no data"),
        (["--scheme", "w4a16", "--chunk-tokens", "8"], "--chunk-tokens: --scheme w4a16 as asked for here takes no"),
        (["--scheme", "gptq", "--chunk-tokens", "0"], "--chunk-tokens: must be at least 1, found 0"),
    ],
)
def test_flags_that_would_do_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["quantize", "--model-path", str(base), "--out", str(tmp_path / "out"), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "told"), [(["--asym"], True), ([], False)])
def test_zero_points_in_version_1_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: bool
) -> None:
    """GPTQModel 7.6 refuses them in files that it did not write."""
    flags = ["--scheme", "w4a16", "--format", "gptq", *flags, "--out", str(tmp_path / "out")]
    assert main(["quantize", "--model-path", str(base), *flags]) == 0
    assert ("--format gptq_v2 is what they take" in capsys.readouterr().out) == told


def test_fewer_rows_than_asked_for_are_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", SAMPLES)
    flags = ["--scheme", "fp8-static", "--calibration", str(tmp_path / "ids.npy"), "--seqlen", "32"]
    assert main(["quantize", "--model-path", str(base), "--out", str(tmp_path / "out"), *flags]) == 0
    assert "calibrating on 6 rows of 32 tokens (--samples asks for 512" in capsys.readouterr().out


def test_rows_end_where_the_models_positions_do(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", np.zeros(600, np.int32))
    flags = ["--scheme", "fp8-static", "--calibration", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "out")]
    assert main(["quantize", "--model-path", str(base), *flags, "--seqlen", "257"]) == 2
    assert "--seqlen: 257 is more than the model's 256 positions" in capsys.readouterr().err
    assert main(["quantize", "--model-path", str(base), *flags]) == 0
    assert "calibrating on 2 rows of 256 tokens" in capsys.readouterr().out
    assert main(["eval", "--model-path", str(base), "--text", str(tmp_path / "ids.npy")]) == 2
    assert "--seqlen: 512 is more than the model's 256 positions" in capsys.readouterr().err


def test_a_quantized_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "one", Options("w8a16"))
    with pytest.raises(jqserve.JqserveError, match="is quantized already"):
        quantize(tmp_path / "one", tmp_path / "two", Options("w8a16"))


def test_shards_are_linked_and_indexed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jqserve.quantize import output

    quantize(base, tmp_path / "one", Options("w8a16"))
    monkeypatch.setattr(output.assemble, "__defaults__", (1,))
    quantize(base, tmp_path / "several", Options("w8a16"))
    assert len(list((tmp_path / "several").glob("model-*-of-00005.safetensors"))) == 5
    tokens = np.arange(8)
    one, several = (jqserve.load(tmp_path / name, dtype="float32") for name in ("one", "several"))
    assert np.array_equal(one[0](one[1], tokens), several[0](several[1], tokens))
