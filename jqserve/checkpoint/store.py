"""Our own form of a checkpoint: the canonical tree in Orbax arrays, a section a layer, beside a checked manifest.

DIR/jqserve.json     the manifest (`manifest.py`), written last
DIR/arrays/<section> one Orbax tree each: embed, layers.0, ..., final_norm, lm_head; both ways stream through them
DIR/config.json, tokenizer files, ...: copied from the original
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jqserve.checkpoint import manifest
from jqserve.checkpoint.asked import Answer, Stored, answer, check_something_fits
from jqserve.checkpoint.kv_scales import read as read_kv_scales
from jqserve.checkpoint.loaded import Activations, LoadedCheckpoint, Place, Progress, Weight, keep_on_host, set_path
from jqserve.checkpoint.manifest import LeafFacts
from jqserve.checkpoint.matrix_row import matrix_row
from jqserve.checkpoint.open import AnyCheckpoint, open_checkpoint
from jqserve.checkpoint.open import is_store as is_store
from jqserve.checkpoint.opening import OpenModel, check_activations, check_dtype, open_model
from jqserve.checkpoint.plan import LoadPlan, PlanRow, joined_notes
from jqserve.checkpoint.scheme import cast
from jqserve.checkpoint.store_check import described, section_of
from jqserve.checkpoint.stream import Stream
from jqserve.errors import CheckpointError
from jqserve.quant import NO_ACTIVATION, QuantizedTensor


def convert(
    source: str | Path | AnyCheckpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    progress: Progress | None = None,
) -> LoadPlan:
    """Writes the checkpoint `source` (a directory, a .gguf file, or an open one) as canonical tree to `out`, which must
    not exist or be empty.

    Streams: host memory stays near the largest layer. Raises as `convert.load` does.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty directory; choose another --out")
    with open_checkpoint(source) as checkpoint:
        opened = open_model(checkpoint, dtype, "config", quantization)
        out.mkdir(parents=True, exist_ok=True)
        with _nothing_half_written(out):
            body = _write_arrays(opened, out, progress)
            checkpoint.copy_side_files(out)
            manifest.write(out, body)
    return LoadPlan.from_json(body["plan"])


@contextlib.contextmanager
def _nothing_half_written(out: Path) -> Iterator[None]:
    """What did not come to its end is removed, for `convert` takes no directory that holds something."""
    try:
        yield
    except BaseException:
        for entry in out.iterdir():  # all of it is ours: the directory was empty
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        raise


def _write_arrays(opened: OpenModel, out: Path, progress: Progress | None) -> dict[str, Any]:
    orbax = _checkpointer()
    stream = Stream.of(opened, keep_on_host, "host")
    sections: dict[str, dict[str, Any]] = {}
    rows: list[PlanRow] = []
    pending: dict[str, Weight] = {}
    current = ""

    def flush() -> None:
        if pending:
            arrays = {_key(n, f): a for n, leaf in pending.items() for f, a in manifest.arrays_of(leaf).items()}
            where = (out / "arrays" / current).absolute()
            try:
                with _quiet():
                    orbax.save(where, arrays)
            except (OSError, ValueError) as error:  # tensorstore's are ValueErrors of many lines
                full = "No space left on device" in str(error)
                reason = os.strerror(errno.ENOSPC) if full else str(error).splitlines()[0]
                raise CheckpointError(f"{where}: could not be written: {reason}") from error
            sections[current] = {name: manifest.facts_of(leaf).to_json() for name, leaf in pending.items()}
            pending.clear()

    scales: dict[str, dict[str, Weight]] = {}
    if opened.audited.kv is not None:
        for name, scale in read_kv_scales(opened.checkpoint, opened.audited.kv):
            scales.setdefault(section_of(name), {})[name] = scale
    for done, built in enumerate(stream, 1):
        if built.path == "kv_scales":  # written with their layers
            continue
        if section_of(built.path) != current:
            flush()
            current = section_of(built.path)
            pending.update(scales.get(current, {}))
        pending.update(built.leaves)
        rows += built.rows
        if progress:
            progress(done, len(stream), built.path)
    flush()
    return {
        "config": opened.config.to_json(),
        "generation_config": opened.generation_config,
        "plan": opened.plan(rows).to_json(),
        "sections": sections,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's tracebacks, of each of its threads, about an error that it raises as well."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        absl.setLevel(level)


def _key(leaf: str, field: str) -> str:
    """Orbax's name of an array. Slashes and dots would nest or be mistaken: the path stays one word."""
    return f"{leaf}:{field}" if field else leaf


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp  # 3 s to import: only where it is needed

    return ocp.PyTreeCheckpointer(use_compression=False)  # packed weights do not compress


def restore(
    path: str | Path,
    *,
    dtype: str | None = None,
    activations: Activations = "config",
    quantization: str | None = None,
    device_put: Place,
    progress: Progress | None = None,
) -> LoadedCheckpoint:
    """Reads what `convert` wrote, section by section; every array is checked against the manifest.

    The arguments are those of `convert.load`. Raises CheckpointError naming the file and the array.
    """
    path = Path(path)
    config, generation, plan, sections = described(path)
    dtype = config.dtype if dtype in (None, "auto") else str(dtype)
    check_dtype(dtype)
    check_activations(activations)
    specs = [leaf.spec for leaves in sections.values() for leaf in leaves.values() if leaf.spec is not None]
    asked = answer(quantization, plan.method, (Stored(spec, plan.method) for spec in specs), path)
    check_something_fits(asked.online, plan.dense_linears, path)
    stored = {row.path: row for row in plan.rows}
    params: dict[str, Any] = {}
    rows: list[PlanRow] = []
    total = sum(map(len, sections.values()))
    for done, (name, leaf) in enumerate(_leaves(path, sections), 1):
        if activations == "none" and name.endswith((".k_scale", ".v_scale")):
            continue
        leaf = _adapted(name, leaf, dtype, activations, asked)
        if row := stored.get(name.removesuffix(".weight")):
            online = asked.online is not None and isinstance(leaf, QuantizedTensor)
            method = "online" if online else row.scheme.partition(":")[0]
            quantizes = asked.online if row.path.startswith("layers.") and row.spec is None else None
            note = joined_notes(row.note, quantizes.misfit(*row.shape) if quantizes else "")
            rows.append(matrix_row(row.path, row.source, method, leaf, note))
        set_path(params, name, device_put(leaf))
        if progress:
            progress(done, total, name)
    plan = dataclasses.replace(plan, method=asked.method(plan.method), rows=tuple(rows))
    if asked.note:
        plan = dataclasses.replace(plan, notes=(asked.note, *plan.notes))
    return LoadedCheckpoint(dataclasses.replace(config, dtype=dtype), params, plan, generation)


def _leaves(path: Path, sections: dict[str, dict[str, LeafFacts]]) -> Iterator[tuple[str, Weight]]:
    """(leaf's path, leaf of numpy arrays), the next section being read while one is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: Future[dict[str, Weight]] | None = None
        for section, facts in [*sections.items(), ("", {})]:
            arrived, waiting = waiting, pool.submit(_section, path, section, facts) if section else None
            if arrived is not None:
                yield from arrived.result().items()


def _section(path: Path, section: str, leaves: dict[str, LeafFacts]) -> dict[str, Weight]:
    import orbax.checkpoint as ocp

    wanted = {_key(name, field): facts for name, leaf in leaves.items() for field, facts in leaf.arrays.items()}
    where = (path / "arrays" / section).absolute()
    try:
        stored = _checkpointer().metadata(where).item_metadata.tree
        for name, facts in wanted.items():  # before memory is taken: a damaged header may ask for any amount of it
            if name not in stored or tuple(stored[name].shape) != facts.shape:
                seen = list(stored[name].shape) if name in stored else "nothing"
                raise CheckpointError(
                    f"{where}: {name}: {seen} found, the manifest says {list(facts.shape)}; run `jqserve convert` again"
                )
        as_numpy = dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray))
        arrays = _checkpointer().restore(where, item=dict.fromkeys(wanted, 0), restore_args=as_numpy)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and tensorstore raise whatever comes; all of it means the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{where}: Orbax cannot restore it: {reason}; run `jqserve convert` again") from error
    for name, facts in wanted.items():
        found = manifest.ArrayFacts.of(arrays[name])
        if found != facts:
            raise CheckpointError(
                f"{where}: {name}: {found} found, the manifest says {facts}; run `jqserve convert` again"
            )
    return {
        name: manifest.leaf_of(leaf, {field: arrays[_key(name, field)] for field in leaf.arrays})
        for name, leaf in leaves.items()
    }


def _adapted(name: str, leaf: Weight, dtype: str, activations: Activations, asked: Answer) -> Weight:
    """A stored leaf as the caller's flags want it."""
    if name.endswith((".k_scale", ".v_scale")):
        return leaf
    if isinstance(leaf, QuantizedTensor):
        if activations == "none":
            return leaf.replace(spec=leaf.spec.replace(activation=NO_ACTIVATION), input_scale=None)
        if asked.activation is not None:
            return leaf.replace(spec=leaf.spec.replace(activation=asked.activation), input_scale=None)
        return leaf
    quantizable = name.startswith("layers.") and name.endswith(".weight") and leaf.ndim == 2
    if asked.online is not None and quantizable:
        online = (
            asked.online if activations == "config" else dataclasses.replace(asked.online, activation=NO_ACTIVATION)
        )
        leaf = online.quantize(leaf)
        return leaf if isinstance(leaf, QuantizedTensor) else cast(leaf, dtype)
    return cast(leaf, dtype)
