"""The whole evaluation: what was asked for, measured one after the other, as one JSON object."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jqserve
from jqserve.checkpoint.gguf_file import gguf_of
from jqserve.checkpoint.hub import resolve
from jqserve.checkpoint.open import is_store
from jqserve.errors import RequestError
from jqserve.evaluate.engines import Generator, tokenizer_of, tokens_per_second
from jqserve.evaluate.layers import layer_errors
from jqserve.evaluate.likelihood import predict
from jqserve.evaluate.tasks import read_tasks, score
from jqserve.evaluate.verdict import judge
from jqserve.evaluate.windows import read_windows
from jqserve.library import Model, Params, load

log = logging.getLogger(__name__)

#: Windows that errors by layer are measured on.
LAYER_WINDOWS = 4
#: What quantizing leaves as it is; the error of a Linear can only be told where they agree.
SHAPES = ("vocab_size", "hidden_size", "ffn_size", "layers", "heads", "kv_heads", "head_dim", "qk_norm")
#: (stage, done, of)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Question:
    """What to measure. `activations` "none" looks at the weights alone, whatever the checkpoint asks for its inputs."""

    model: str
    base: str | None = None
    text: Path | None = None
    windows: int = 64
    seqlen: int = 512
    tasks: Path | None = None
    limit: int | None = None
    layers: bool = True
    speed: bool = True
    threshold: float = 0.98
    dtype: str | None = None
    activations: Any = "config"


def evaluate(question: Question, progress: Progress | None = None) -> dict[str, Any]:
    """{"model", "base", "size", "text", "tasks", "layers", "speed", "verdict", ...}; what was not asked for is None.

    Raises RequestError where nothing was asked for, and as loading does.
    """
    if question.text is None and question.tasks is None:
        raise RequestError("--text", "nothing to measure: give --text FILE, --tasks FILE, or both")
    tasks = read_tasks(question.tasks, question.limit) if question.tasks else None
    path = str(resolve(question.model))
    model, params = load(path, dtype=question.dtype, activations=question.activations)
    if question.text is not None and question.seqlen > model.config.max_position:
        positions = model.config.max_position
        raise RequestError("--seqlen", f"{question.seqlen} is more than the model's {positions} positions")
    base, base_path = None, None
    if question.base is not None:
        base_path = str(resolve(question.base))
        base = load(base_path, dtype=question.dtype)
        _comparable(question, model, base[0])
    warnings = _warnings(question, model, None if base is None else base[0])
    for warning in warnings:
        log.warning("warning: %s", warning)  # now: what follows may take long

    def told(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, of: progress(stage, done, of)

    result: dict[str, Any] = {
        "model": question.model,
        "base": question.base,
        "scheme": _scheme(model),
        "base_scheme": None if base is None else _scheme(base[0]),
        "warnings": warnings,
        "size": {"model": _bytes(path), "base": None if base_path is None else _bytes(base_path)},
    }
    result["text"] = result["layers"] = result["tasks"] = None
    if question.text is not None:
        vocab = model.config.vocab_size
        windows = read_windows(question.text, question.windows, question.seqlen, vocab, lambda: tokenizer_of(path))
        result["text"] = _text(predict(model, params, windows, base, told("text")), question, len(windows))
        if base is not None and question.layers:
            errors = layer_errors(model, params, base, windows[:LAYER_WINDOWS])
            result["layers"] = [dataclasses.asdict(error) for error in errors]
    if tasks is not None:
        result["tasks"] = _tasks(question, path, base_path, (model, params), base, tasks, told)
    result["speed"] = _speed(question, path, base_path, model) if question.speed else None
    verdict = judge(result, question.threshold)
    result["verdict"] = {**dataclasses.asdict(verdict), "passed": verdict.passed, "line": verdict.line()}
    result["made"] = {
        "jqserve": jqserve.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return result


def _comparable(question: Question, model: Model, base: Model) -> None:
    for what in SHAPES:
        mine, other = getattr(model.config, what), getattr(base.config, what)
        if mine != other:
            raise RequestError("--base", f"{question.base} has {what} {other}, the model {mine}: not its base")


def _warnings(question: Question, model: Model, base: Model | None) -> list[str]:
    """A base may be quantized (two schemes can be compared so), but then the verdict is not what it is taken for.
    Another theta is another model, or a config.json whose theta was lost on the way: the numbers show it, not why."""
    found: list[str] = []
    if base is None:
        return found
    if any(row.spec is not None for row in base.plan.rows):
        found.append(
            f"--base {question.base} is quantized itself ({_scheme(base)}): the verdict is on what is lost beside it, "
            "not beside the unquantized model"
        )
    mine, other = model.config.rope.theta, base.config.rope.theta
    if not math.isclose(mine, other, rel_tol=1e-6):  # a GGUF file has it in float32
        found.append(
            f"--base {question.base} has rope theta {other:g}, the model {mine:g}: it is not its base, or one "
            "config.json is wrong"
        )
    return found


def _text(found: Any, question: Question, windows: int) -> dict[str, Any]:
    kl = None if found.kl is None else [round(float(value), 6) for value in found.kl]
    return {
        "file": str(question.text),
        "windows": windows,
        "seqlen": question.seqlen,
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "base_perplexity": found.base_perplexity,
        "kl": found.mean_kl,
        "top1_agreement": found.agree,
        "kl_by_position": kl,
    }


def _tasks(
    question: Question,
    path: str,
    base_path: str | None,
    model: tuple[Model, Params],
    base: tuple[Model, Params] | None,
    tasks: Any,
    told: Callable[[str], Any],
) -> dict[str, Any]:
    found: dict[str, Any] = {"file": str(question.tasks), "count": len(tasks), "base_accuracy": None}
    sides = (("", model, path, question.activations), ("base_", base, base_path, "config"))
    for prefix, own, where, activations in sides:
        if own is None or where is None:
            continue
        context = min(1024, own[0].config.max_position)
        generate = Generator(where, question.dtype, context, activations)
        scores = score(*own, tokenizer_of(where), tasks, generate, told(f"{prefix}tasks".replace("_", " ")))
        generate.close()
        found[f"{prefix}accuracy"] = scores.accuracy
        found[f"{prefix}by_kind"] = {kind: list(pair) for kind, pair in scores.by_kind.items()}
    return found


def _speed(question: Question, path: str, base_path: str | None, model: Model) -> dict[str, float | None] | None:
    vocab = model.config.vocab_size
    own = tokens_per_second(path, question.dtype, vocab)
    if own is None:
        return None
    return {"model": own, "base": None if base_path is None else tokens_per_second(base_path, question.dtype, vocab)}


def _scheme(model: Model) -> str:
    """The scheme of most of the weights, as the load plan has it."""
    shares: dict[str, int] = {}
    for row in model.plan.rows:
        if row.path.startswith("layers."):
            shares[row.scheme] = shares.get(row.scheme, 0) + row.bytes
    return max(shares, key=lambda scheme: shares[scheme])


def _bytes(path: str) -> int:
    """On disk: of a GGUF file, of all that `jqserve convert` wrote, or of a directory's safetensors."""
    gguf = gguf_of(path)
    files = [gguf] if gguf else Path(path).rglob("*") if is_store(path) else Path(path).glob("*.safetensors")
    return sum(file.stat().st_size for file in files if file.is_file())
