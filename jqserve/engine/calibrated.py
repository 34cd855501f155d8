"""--quantization awq or gptq on an unquantized checkpoint, with --calibration FILE or a small text of our own.

What is loaded then is a `Calibrated` checkpoint, in the place of the path.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jqserve.checkpoint.asked import CALIBRATED, FORMATS
from jqserve.checkpoint.gguf_file import gguf_of
from jqserve.checkpoint.hf import Checkpoint
from jqserve.checkpoint.names import LinearGroup, LinearSlot, modules
from jqserve.checkpoint.open import AnyCheckpoint, is_store
from jqserve.checkpoint.opening import read_configs
from jqserve.checkpoint.quant_config import quant_plan
from jqserve.errors import RequestError, UnsupportedError
from jqserve.quantize import calibration
from jqserve.quantize.online import Calibrated
from jqserve.quantize.options import Options

log = logging.getLogger(__name__)
FLAG = calibration.FLAG
#: Rows at most, and tokens a row: those of `jqserve quantize`; the built-in text is cut shorter, or it were one row.
SAMPLES, SEQLEN, BUILT_IN_SEQLEN = 512, 2048, 256
BUILT_IN = Path(calibration.__file__).parent / "text" / "calibration.txt"


def open_asked(
    path: str | Path,
    quantization: str | None,
    calibrate_on: str | None = None,
    tokenizer: str | None = None,
    *,
    headers_alone: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[str | Path | AnyCheckpoint, str | None]:
    """(what to load, the `quantization` to load it with): the arguments themselves but for a scheme that calibrates, on
    a Hugging Face directory that is not quantized yet.

    calibrate_on   a file or directory, as `jqserve quantize` takes it; None: the built-in text
    tokenizer      a directory, if it is not the model's
    headers_alone  for a plan: no text is read, and no tensor can be
    progress       of calibrating: called with (layers done, layers in all, which one was quantized)

    Raises RequestError for a flag that has nothing to do, and for a file that is missing, unreadable or too short;
    CheckpointError and UnsupportedError as opening does.
    """
    scheme = FORMATS.get(quantization or "")
    if scheme not in CALIBRATED:
        if calibrate_on is not None:
            raise RequestError(FLAG, f"belongs to --quantization awq or gptq, not to {quantization or 'none'}")
        return path, quantization
    dense = not is_store(path) and gguf_of(path) is None
    if dense:
        with Checkpoint(path, weights=False) as checkpoint:
            dense = quant_plan(checkpoint).method == "none"
            config, _ = read_configs(checkpoint, "auto")
    if not dense:
        if calibrate_on is not None:
            raise RequestError(FLAG, f"{path} is no unquantized Hugging Face directory: there is nothing to calibrate")
        return path, quantization
    seqlen = min(SEQLEN if calibrate_on else BUILT_IN_SEQLEN, config.max_position)
    text = (
        f"the text of {calibrate_on}"
        if calibrate_on
        else "a built-in text, which is small: --calibration FILE does better"
    )
    how = "" if quantization == scheme else f" (the name is accepted for {scheme})"
    note = f"--quantization {quantization}{how}: quantized while loading as `jqserve quantize --scheme {scheme}` does"
    stored = Options(scheme).writer().dtype
    if stored not in ("", config.dtype):  # a range that some bfloat16 models leave: not to be found out from answers
        note += f" (into {stored}, as the format is, and computed in it unless --dtype says {config.dtype})"
    groups = [module for module in modules(config) if isinstance(module, LinearGroup) and module.parent]
    check_groups(path, [slot for group in groups for _, slot in group.parts], quantization, scheme)
    if headers_alone:
        if calibrate_on is not None and not Path(calibrate_on).exists():
            raise RequestError(FLAG, f"no such file or directory: {calibrate_on}")
        tokens = SAMPLES * seqlen if calibrate_on else BUILT_IN.stat().st_size // 4
        return Calibrated(path, Options(scheme), note=f"{note}, calibrated on {text}", tokens=tokens), None
    end = config.eos_token_ids[0] if config.eos_token_ids else None
    samples = calibration.read_calibration(
        Path(calibrate_on) if calibrate_on else BUILT_IN,
        SAMPLES,
        seqlen,
        config.vocab_size,
        lambda: _tokenizer(str(tokenizer or path)),
        end,
        short="a calibration text must fill one; longer is better",
    )
    note += f", calibrated on {len(samples)} rows of {seqlen} tokens of {text}"
    log.info("%s. This takes minutes where other schemes take seconds; `jqserve quantize` does it once", note)
    return Calibrated(path, Options(scheme), samples, note=note, progress=progress), None


def check_groups(path: str | Path, slots: list[LinearSlot], quantization: str | None, scheme: str) -> None:
    """Raises UnsupportedError for a model that the scheme's groups do not divide, with the command that can choose
    others: the server has no flag for it."""
    group = Options(scheme).row.group[1]
    bad = next((slot for slot in slots if slot.k % group), None)
    if bad is None:
        return
    fitting = next((size for size in (64, 32) if not any(s.k % size for s in slots)), -1)
    raise UnsupportedError(
        f"--quantization {quantization}: its groups are of {group}, and {bad.name} has {bad.k} in features; `jqserve "
        f"quantize --model-path {shlex.quote(str(path))} --scheme {scheme} --group-size {fitting} --calibration FILE "
        "--out DIR`, then serve DIR"
    )


def _tokenizer(path: str) -> Any:
    from jqserve.server.tokenizer import load_tokenizer

    return load_tokenizer(path)
