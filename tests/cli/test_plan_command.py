"""`jqserve plan`: its rows are those of the loaded model, byte for byte, with no tensor read and no device named."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from jqserve.checkpoint import dummy, store
from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.checkpoint.forecast import forecast
from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.opening import open_model
from jqserve.checkpoint.plan import LoadPlan
from jqserve.checkpoint.safetensors_file import SafetensorsFile
from jqserve.checkpoint.store_forecast import forecast_store
from jqserve.cli import present_gpu
from jqserve.cli.main import main
from jqserve.cli.plan import add_arguments, show
from jqserve.cli.server import parser
from jqserve.engine.config import EngineConfig
from jqserve.engine.load import load_engine
from jqserve.ops.kernels import GENERIC
from tests.checkpoint import configs, gguf_files, tiny
from tests.checkpoint.flag_table import CHECKPOINTS
from tests.checkpoint.tiny_more import blocks

SIZES = {"num_hidden_layers": 1, "hidden_size": 256}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_rows_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path, *CHECKPOINTS[name], **SIZES)
    with Checkpoint(made.path) as checkpoint:
        found = forecast(open_model(checkpoint, None, "config", None))
    loaded = load(made.path, device_put=keep_on_host)
    assert found.plan == loaded.plan
    assert found.plan.bytes + found.vectors == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))


@pytest.mark.parametrize("flag", ["fp8", "fp8_block", "int4-32", "w8a8_int8", "torchao:int4wo-64", "bitsandbytes"])
def test_rows_of_online_schemes(flag: str, tmp_path: Path) -> None:
    made = tiny.make(tmp_path, **SIZES)
    with Checkpoint(made.path) as checkpoint:
        found = forecast(open_model(checkpoint, None, "config", flag))
    assert found.plan == load(made.path, quantization=flag, device_put=keep_on_host).plan


def planned(capsys: pytest.CaptureFixture[str], *options: Any) -> dict[str, Any]:
    assert main(["--debug", "plan", *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("columns", "lines"), [(80, True), (240, False)])
def test_a_narrow_terminal_cuts_nothing_off(
    demo_dir: Path, capsys: pytest.CaptureFixture[str], columns: int, lines: bool
) -> None:
    """In 80 columns the table had "com…" for a scheme and "sca…" for a kernel."""
    found = planned(capsys, demo_dir, "--device", "h200")
    plan, out = LoadPlan.from_json({key: found[key] for key in ("method", "rows", "notes")}), io.StringIO()
    show(plan, Console(file=out, width=columns, force_terminal=True, color_system=None))
    assert "…" not in out.getvalue() and "w4a16" in out.getvalue()
    assert ("│" not in out.getvalue()) == lines


def test_nothing_is_read_and_no_device_is_named(
    demo_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr(jax, "devices", lambda *a: pytest.fail("a device was asked for"))
    h200, a100 = (planned(capsys, demo_dir, "--device", device) for device in ("h200", "a100"))
    kernels = {row["path"]: row["kernel"] for row in h200["rows"]}
    assert "w4a16/decode_sm90" in kernels["layers.0.attn.qkv"] and "w4a16/wgmma_sm90" in kernels["layers.0.attn.qkv"]
    assert {row["kernel"] for row in a100["rows"]} == {GENERIC, ""}
    assert h200["bound_tokens_per_second"] == pytest.approx(4.8e12 / h200["read_bytes_per_step"])
    assert h200["kv_cache"]["bytes_per_token"] == 2 * 6 * 2 * 64 * 2  # k and v, layers, KV heads, head size, bf16
    assert h200["buckets"]["decode"][-1] == 256
    assert h200["unquantized"] == {"model.embed_tokens": "the embedding is looked up and serves as head"}


def test_the_kernel_of_one_request_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bound stands at batch 1; the kernel there is another than at 16 rows, in an 8B model's narrow matrices."""
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    config = {**tiny.CONFIG, **sizes, "quantization_config": configs.awq(128)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options, qkv in (
        ([], "decode w4a16/decode_sm90 up to 8 rows, then w4a16/wgmma_sm90, prefill w4a16/wgmma_sm90"),
        (["--max-running-requests", 8], "decode w4a16/decode_sm90, prefill w4a16/wgmma_sm90"),
        (["--device", "a100"], GENERIC),
    ):
        found = planned(capsys, tmp_path, "--load-format", "dummy", *options)
        assert next(row["kernel"] for row in found["rows"] if row["path"] == "layers.0.attn.qkv") == qkv


def test_the_gpu_of_this_machine_is_planned_for(
    demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(present_gpu, "DRIVER", tmp_path)
    assert planned(capsys, demo_dir)["device"]["name"] == "h200"  # none is there
    file = tmp_path / "0000:17:00.0" / "information"
    file.parent.mkdir()
    file.write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 207\nGPU UUID: \t GPU-1\n")
    assert planned(capsys, demo_dir)["device"]["name"] == "h100"
    assert planned(capsys, demo_dir, "--device", "a100")["device"]["name"] == "a100"
    file.write_text("Model: \t\t NVIDIA A100-SXM4-40GB\n")  # half the memory of the a100 that is known
    found = planned(capsys, demo_dir)
    assert found["device"]["name"] == "h200"
    assert any("NVIDIA A100-SXM4-40GB has no data sheet" in warning for warning in found["warnings"])


def test_awq_while_loading_says_that_it_is_computed_in_float16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is AutoAWQ's dtype, and not the checkpoint's; GPTQ's files have none of their own."""
    made = tiny.make(tmp_path, **SIZES).path
    found = planned(capsys, made, "--quantization", "awq")
    assert found["model"]["dtype"] == "float16" and "computed in it unless --dtype says bfloat16" in found["notes"][0]
    assert planned(capsys, made, "--quantization", "awq", "--dtype", "bfloat16")["model"]["dtype"] == "bfloat16"
    found = planned(capsys, made, "--quantization", "gptq")
    assert found["model"]["dtype"] == "bfloat16" and "computed in" not in found["notes"][0]


def test_a_model_that_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An 8B model: 29.9 GiB in float32 and 15 in bfloat16, where an L4 has 22."""
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    config = {**tiny.CONFIG, **sizes, "num_hidden_layers": 32, "vocab_size": 128256, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for dtype, fits in (("float32", False), ("bfloat16", True)):
        found = planned(capsys, tmp_path, "--load-format", "dummy", "--device", "l4", "--dtype", dtype)
        said = [warning for warning in found["warnings"] if "does not fit" in warning]
        assert bool(said) != fits
        assert fits or ("loading needs 3" in said[0] and said[0].endswith("l4 has 22.352"))


#: What a plan has no use for, and what takes its time to import.
HEAVY = ("jax", "jaxlib", "flax", "transformers", "torch", "grpc", "huggingface_hub", "orbax", "tokenizers")


@pytest.mark.parametrize("options", [[], ["--json"], ["--tp", "2", "--device", "a100"]], ids=" ".join)
@pytest.mark.parametrize("name", ["demo", "dense", "dense awq", "fp8", "gguf"])
def test_nothing_heavy_is_imported(name: str, options: list[str], tmp_path: Path, demo_dir: Path) -> None:
    """That is what makes it quick (bench/plan_time.py); pallas and Mosaic are parts of jax."""
    words = [str(demo_dir), *options]
    if name.startswith("dense"):
        words[0] = str(tiny.make(tmp_path, **SIZES).path)
        words += ["--quantization", name.partition(" ")[2] or "int4-64"]
    elif name == "fp8":
        words[0] = str(tiny.make(tmp_path, *CHECKPOINTS["compressed-tensors FP8 dynamic"], **SIZES).path)
    elif name == "gguf":
        words[0] = str(gguf_files.write(tmp_path / "m.gguf"))
    code = (
        "import sys\n"
        "from jqserve.cli.main import main\n"
        f"assert main(['--debug', 'plan', *{words!r}]) == 0\n"
        f"loaded = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not loaded, f'a plan imported {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "h200" in done.stdout or "a100" in done.stdout


def test_the_engine_tells_the_same_totals_when_it_has_loaded(
    demo_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    options: dict[str, Any] = {"max_running_requests": 8, "chunked_prefill_size": 64, "num_pages": 50}
    config = EngineConfig(str(demo_dir), context_length=64, disable_warmup=True, **options)
    load_engine(config, lambda stage, text, _: told.append(text) if stage == "plan" else None)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["plan", str(demo_dir), "--device", "cpu", *flags]) == 0
    foretold = [
        line for line in capsys.readouterr().out.splitlines() if line[:2] in ("on", "we", "pe", "KV", "bo", "co")
    ]
    loaded = told[1].splitlines()
    assert [line[:18] for line in loaded] == [line[:18] for line in foretold] and len(loaded) == 6
    for measured in ("peak", "KV cache"):  # not foretold to the byte, and "tokens fit in ... pages"
        loaded, foretold = ([line for line in lines if not line.startswith(measured)] for lines in (loaded, foretold))
    assert loaded == foretold
    assert "800 tokens fit in 50 pages" in told[1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([""], "the model's path is empty"),
        (["--model-path", ""], "the model's path is empty"),
        (["DEMO", "--context-length", "100000"], "context_length 100000 is more than the model's 2048 positions"),
        (["DEMO", "--schedule-conservativeness", "nan"], "schedule_conservativeness nan is not in 0 .. 10"),
        (["DEMO", "--chunked-prefill-size", "20000"], "chunked_prefill_size 20000 is more than 16384"),
    ],
)
def test_what_the_server_would_refuse_is_refused(
    demo_dir: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert main(["plan", *(str(demo_dir) if flag == "DEMO" else flag for flag in flags)]) == 2
    assert says in capsys.readouterr().err


def test_a_split_that_cuts_a_group_is_said(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three, four = (planned(capsys, demo_dir, "--tp", n) for n in (1, 2, 3, 4))
    tokens = [found["kv_cache"]["bytes_per_token"] for found in (one, two, three, four)]
    assert tokens == [tokens[0], tokens[0] // 2, tokens[0], tokens[0] // 2]  # two KV heads: four GPUs hold one each
    assert two["tp"]["problems"] == [] and two["tp"]["bytes_per_gpu"] < 0.6 * two["weight_bytes"]
    assert any("groups of 128" in problem and problem.startswith("o:") for problem in three["tp"]["problems"])
    assert any("heads" in warning for warning in three["warnings"])


def test_a_split_that_cuts_a_block_of_scales_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """256 rows of q are two blocks of 128, for two GPUs and not for four; 512 of gate are four."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4)
    made = tiny.make(tmp_path, blocks(), configs.fp8(weight_block_size=[128, 128]), **sizes)
    one, two, four = (planned(capsys, made.path, "--tp", n)["tp"]["problems"] for n in (1, 2, 4))
    assert one == [] and two == []
    assert "qkv: 64 output features a GPU do not end with a block of 128" in four
    assert not any(problem.startswith("gate_up") for problem in four)
    assert any(p.startswith("gate_up: 64 output") for p in planned(capsys, made.path, "--tp", 8)["tp"]["problems"])


def test_kv_heads_that_are_repeated_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two KV heads on four GPUs: each holds one whole head's rows of k and of v, and a quarter of all the rest."""
    made = tiny.make(tmp_path)
    found = planned(capsys, made.path, "--tp", 4, "--dtype", "bfloat16")
    vectors = 2 * 128 * (2 * 2 + 1)
    rest = 64 * 128 + 2 * (128 * 128 * 2 + 3 * 128 * 256)
    assert found["tp"]["bytes_per_gpu"] == 2 * rest // 4 + 2 * 2 * (2 * 32 * 128) + vectors


def test_flags_and_dense_modules(fixtures_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = planned(capsys, fixtures_dir / "gptq-dynamic")
    assert "model.layers.0.self_attn.q_proj" in mixed["unquantized"]
    assert any(warning.startswith("mixed schemes") for warning in mixed["warnings"])
    online = planned(capsys, fixtures_dir / "base-bf16", "--torchao-config", "int4wo-64", "--kv-cache-dtype", "fp8")
    assert online["notes"][0].endswith("--torchao-config int4wo-64") and online["kv_cache"]["dtype"] == "fp8_e4m3"
    assert any("scale 1.0 for every layer" in warning for warning in online["warnings"])
    nf4 = planned(capsys, fixtures_dir / "bnb-nf4-double")
    assert any("no packed kernel" in warning for warning in nf4["warnings"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "takes one model"),
        (["x/y", "--model-path", "z"], "takes one model"),
        (["./nowhere"], "no such directory"),
        (["DEMO", "--quantization", "fp8"], "quantized already"),
        (
            ["DEMO", "--quantization", "fp8", "--load-format", "dummy"],
            "Leave the flag out: `jqserve-server --model-path DEMO`",
        ),
        (["BASE", "--quantization", "awq", "--load-format", "dummy"], "awq is calibrated on the weights"),
        (["DEMO", "--calibration", "x.txt", "--load-format", "dummy"], "no weights to calibrate"),
        (["DEMO", "--quantization", "fp8", "--torchao-config", "int8wo"], "give one of them"),
        (["DEMO", "--tp", "0"], "at least 1"),
        (["DEMO", "--kv-cache-dtype", "int3"], "int3"),
        (["DEMO", "--mem-fraction-static", "2"], "0.05 .. 0.98"),
    ],
)
def test_refused_in_one_line(
    options: list[str], words: str, demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.make(tmp_path).path
    assert main(["plan", *(str({"DEMO": demo_dir, "BASE": base}.get(x, x)) for x in options)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words.replace("DEMO", str(demo_dir)) in message


def test_the_table_for_people(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "plan", str(demo_dir), "--tp", "2"]) == 0
    text = capsys.readouterr().out
    for words in ("layers.0-5.attn.qkv", "w4a16/decode_sm90", "peak while loading", "tokens fit", "per GPU", "buckets"):
        assert words in text, words


def test_kv_scales_are_told_of(tmp_path: Path, fixtures_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning where something is amiss, and only there."""
    scaled = fixtures_dir / "ct-fp8-kv"
    assert not [w for w in planned(capsys, scaled)["warnings"] if "KV cache" in w]
    assert planned(capsys, scaled)["kv_cache"]["scales"] == "scales of the checkpoint"
    narrow = planned(capsys, scaled, "--kv-cache-dtype", "bf16")
    assert "KV cache in bfloat16: the checkpoint's fp8 scales are not used" in narrow["warnings"]
    weights, inputs = configs.weights(8, "float", "channel"), configs.inputs("float")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    promised = configs.compressed("float-quantized", weights, inputs, kv_cache_scheme=scheme)
    made = tiny.make(tmp_path, tiny.eight(), promised, **SIZES).path
    missing = planned(capsys, made)
    assert any("has a kv_cache_scheme, but no file has k_scale" in warning for warning in missing["warnings"])
    assert any("has a kv_cache_scheme" in note for note in load(made, device_put=keep_on_host).plan.notes)
    assert not any("kv_cache_scheme" in note for note in planned(capsys, made, "--activations", "none")["notes"])


def test_on_a_cpu_it_is_computed_in_float32(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the engine does, which prints the same table."""
    for flags, dtype in (((), "float32"), (("--dtype", "bfloat16"), "bfloat16")):
        found = planned(capsys, demo_dir, "--device", "cpu", *flags)
        assert (found["model"]["dtype"], found["kv_cache"]["dtype"], found["rows"][0]["dtype"]) == (dtype,) * 3


def test_unquantized_checkpoints_take_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny.make(
        tmp_path, num_hidden_layers=3, hidden_size=256, intermediate_size=384, tie_word_embeddings=False
    ).path
    assert planned(capsys, made)["unquantized"] == {
        "model.embed_tokens": "the embedding is looked up",
        "every Linear": "the checkpoint is not quantized",
    }
    found = planned(capsys, made, "--torchao-config", "int4wo-256")
    uneven, reason = found["unquantized"], "not quantized: 384 in features are no multiple of the group of 256"
    assert uneven["lm_head"] == "the head is never quantized while loading"
    assert uneven["model.layers.{0-2}.mlp.down_proj"] == reason
    assert f"down: {reason}" in found["warnings"]
    rows = [(row["path"], row["scheme"], row["note"]) for row in found["rows"]]
    assert ("layers.0.mlp.down", "dense", reason) in rows
    asked, converted = {"quantization": "torchao:int4wo-256", "device_put": keep_on_host}, tmp_path / "store"
    store.convert(made, converted)
    for loaded in (load(made, **asked), dummy.load(made, **asked), load(converted, **asked)):  # as the server tells it
        assert [(row.path, row.scheme, row.note) for row in loaded.plan.rows] == rows
    found = planned(capsys, converted, "--torchao-config", "int4wo-256")
    assert [(row["path"], row["scheme"], row["note"]) for row in found["rows"]] == rows


def test_it_takes_the_servers_flags(demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server's command line is a plan's: what changes a number does, what does not is no error."""
    plain = planned(capsys, demo_dir)
    serving = [
        "--port",
        "0",
        "--admin",
        "--grpc-compat",
        "none",
        "--api-key",
        "x",
        "--metrics-port",
        "0",
        "--no-self-test",
    ]
    assert planned(capsys, "--model-path", demo_dir, *serving) == plain
    assert planned(capsys, demo_dir, "--num-pages", "10")["kv_cache"]["tokens"] == 10 * 64
    assert plain["kv_cache"]["room"] == plain["kv_cache"]["tokens"]
    assert not any("--num-pages" in w for w in planned(capsys, demo_dir, "--num-pages", "10")["warnings"])
    assert any("--num-pages" in w for w in planned(capsys, demo_dir, "--num-pages", "99999999")["warnings"])
    assert "--page-size 16, 32" in planned(capsys, demo_dir, "--page-size", "48")["kv_cache"]["slow_pages"]
    assert plain["kv_cache"]["slow_pages"] is None
    assert planned(capsys, demo_dir, "--num-continuous-decode-steps", "4")["buckets"]["steps"] == 4
    assert planned(capsys, demo_dir, "--max-running-requests", "24")["buckets"]["decode"] == [1, 8, 16, 24]
    chunked = planned(capsys, demo_dir, "--chunked-prefill-size", "256")["buckets"]["mixed"]
    assert chunked[-1] == "256+256" and len(chunked) < len(plain["buckets"]["mixed"])
    less = planned(capsys, demo_dir, "--mem-fraction-static", "0.5")["kv_cache"]["tokens"]
    assert 0 < less < plain["kv_cache"]["tokens"]
    known = {word for action in parser()._actions for word in action.option_strings}
    taken = argparse.ArgumentParser()
    add_arguments(taken)
    assert known - {"--version"} <= {word for action in taken._actions for word in action.option_strings}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_of_a_config_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--load-format dummy: the specs are those that the random weights will have."""
    made = tiny.make(tmp_path, *CHECKPOINTS[name], **SIZES).path
    (made / "model.safetensors").unlink()
    rows = planned(capsys, made, "--load-format", "dummy")["rows"]
    loaded = dummy.load(made, device_put=keep_on_host).plan
    assert [(row["path"], row["spec"]) for row in rows] == [
        (row["path"], row["spec"]) for row in json.loads(json.dumps(loaded.to_json()))["rows"]
    ]


CONVERTED = ["unquantized", "GPTQ 4-bit, groups of 32, act-order", "compressed-tensors FP8 static"]


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its manifest: the rows are those of restoring it, with the same flags."""
    made = tiny.make(tmp_path / "hf", *CHECKPOINTS[name], tie_word_embeddings=False, **SIZES).path
    store.convert(made, tmp_path / "out")
    flags: list[dict[str, Any]] = [{}, {"activations": "none"}, {"dtype": "float32"}]
    flags += [{"quantization": q} for q in ("int4-64", "fp8", "torchao:int8wo")] if name == "unquantized" else []
    for flag in flags:
        arguments = {"dtype": None, "activations": "config", "quantization": None, **flag}
        config, found = forecast_store(tmp_path / "out", **arguments)
        loaded = load(tmp_path / "out", device_put=keep_on_host, **flag)
        assert found.plan == loaded.plan and config == loaded.config
        assert found.plan.bytes + found.vectors == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    stored, original = planned(capsys, tmp_path / "out"), planned(capsys, made)
    for key in ("rows", "kv_cache", "weight_bytes", "bound_tokens_per_second", "buckets", "warnings", "notes"):
        assert stored[key] == original[key], key
    assert set(stored["unquantized"]) == set(original["unquantized"])
    if name != "unquantized":
        assert main(["plan", str(tmp_path / "out"), "--quantization", "int4-64"]) == 2
        assert "quantized already" in capsys.readouterr().err
