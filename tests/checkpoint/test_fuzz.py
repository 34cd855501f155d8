"""A few hundred damaged checkpoints, by seed: each is refused in our own words, or gives a tree that is right.

Bits are flipped in the header and in the data, files cut and grown, header entries and config fields changed. What
loads after an edit of header or config must equal the undamaged tree, or describe other numbers that the edited
config and the unchanged bytes do say (a different rope theta, say); what loads after a flip in the data must differ in
values alone.
"""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jqserve.checkpoint.convert import keep_on_host, load
from jqserve.errors import CheckpointError, JqserveError, UnsupportedError
from jqserve.quant import QuantizedTensor
from tests.checkpoint import configs as c
from tests.checkpoint import tiny
from tests.checkpoint import tiny_more as m

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
FORMATS: dict[str, tuple[tiny.Maker, dict[str, Any] | None]] = {
    "bf16": (tiny.dense, None),
    "awq": (tiny.awq(32), c.awq(32)),
    "gptq": (tiny.gptq(4, 32, desc_act=True), c.gptq(4, 32, desc_act=True)),
    "gptq8 asym": (tiny.gptq(8, 32, False, v2=True), c.gptq(8, 32, False, v2=True)),
    "packed": (
        tiny.packed(4, 32, sym=False),
        c.compressed("pack-quantized", c.weights(4, "int", "group", 32, sym=False)),
    ),
    "fp8 static": (
        tiny.eight(shape="tensor", static=True),
        c.compressed("float-quantized", c.weights(8, "float", "tensor"), c.inputs("float", static=True)),
    ),
    "int8": (tiny.eight("int"), c.compressed("int-quantized", c.weights(8, "int", "channel"), c.inputs("int"))),
    "bnb nf4 double": (
        m.bnb4("nf4", True),
        m.bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "torchao int4wo": (m.torchao4(32), m.torchao("Int4WeightOnlyConfig", group_size=32)),
    "fp8 blocks": (m.blocks(), c.fp8(weight_block_size=[128, 128])),
    "fp8 plain": (tiny.eight(shape="scalar"), c.fp8()),
}
PER_KIND = 10  # cases of each kind and format: 11 * 5 * 10 = 550


class Case:
    """An undamaged checkpoint in memory, written and damaged again for each seed."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        made = tiny.make(path, *FORMATS[name], num_hidden_layers=1, vocab_size=16, **SIZES)
        self.data = (path / "model.safetensors").read_bytes()
        self.length = int.from_bytes(self.data[:8], "little")
        self.config = made.config
        self.good = load(str(path), device_put=keep_on_host).params

    def write(self, data: bytes | None = None, config: dict[str, Any] | None = None) -> None:
        (self.path / "model.safetensors").write_bytes(self.data if data is None else data)
        (self.path / "config.json").write_text(json.dumps(self.config if config is None else config))


def outcome(case: Case) -> dict[str, Any] | None:
    """The tree, or None for an error of ours that says something; any other exception fails the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return load(str(case.path), device_put=keep_on_host).params
    except (CheckpointError, UnsupportedError) as error:
        assert (len(str(error)) > 20 and str(case.path) in str(error)) or "model." in str(error), str(error)
        return None


def shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def finite(tree: Any) -> bool:
    floats = [x for x in jax.tree.leaves(tree) if x.dtype.kind in "fV"]
    return all(np.isfinite(x.astype(np.float32)).all() for x in floats)


def equal(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def flip_in_header(case: Case, rng: random.Random) -> None:
    data = bytearray(case.data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        data[rng.randrange(8 + case.length)] ^= 1 << rng.randrange(8)
    case.write(bytes(data))
    found = outcome(case)
    # A flip in the padding, in __metadata__, or in a name that makes a harmless extra of nothing changes no value.
    assert found is None or equal(found, case.good)


def flip_in_data(case: Case, rng: random.Random) -> None:
    data = bytearray(case.data)
    for _ in range(rng.choice((1, 10, 200))):
        data[rng.randrange(8 + case.length, len(data))] ^= 1 << rng.randrange(8)
    case.write(bytes(data))
    found = outcome(case)
    if found is not None:
        assert finite(found)
        assert set(found["layers"]["0"]["mlp"]) <= {"gate_up", "gate", "up", "down"}


def cut_or_grow(case: Case, rng: random.Random) -> None:
    if rng.random() < 0.8:
        case.write(case.data[: rng.randrange(len(case.data))])
    else:
        case.write(case.data + bytes(rng.randrange(1, 5000)))
    assert outcome(case) is None


JUNK: list[Any] = [None, True, -1, 0, 1, 7, 1 << 40, 1.5, "x", "", [], [1], {}, {"a": 1}, "I32", "F16", [64, 64], [128]]


def edit_header(case: Case, rng: random.Random) -> None:
    header = json.loads(case.data[8 : 8 + case.length])
    names = [n for n in header if n != "__metadata__"]
    name, other = rng.sample(names, 2)
    kind = rng.randrange(6)
    if kind == 0:
        header[name][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(JUNK)
    elif kind == 1:
        header[name], header[other] = header[other], header[name]
    elif kind == 2:
        header[f"{name}.x"] = header.pop(name)
    elif kind == 3:
        del header[name]
    elif kind == 4:
        header[name]["shape"] = header[name]["shape"][::-1] + [1] * rng.randrange(2)
    else:
        header[name] = rng.choice(JUNK)
    text = json.dumps(header).encode()
    case.write(len(text).to_bytes(8, "little") + text + case.data[8 + case.length :])
    found = outcome(case)
    if found is not None and kind != 1:  # two tensors of one shape and dtype may have changed places
        assert equal(found, case.good)
    if found is not None:
        assert finite(found)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [q for key, value in items for q in [(*path, key), *places(value, (*path, key))]]


def edit_config(case: Case, rng: random.Random) -> None:
    config = copy.deepcopy(case.config)
    everything = places(config)
    inside = [p for p in everything if p[0] == "quantization_config"]
    *parents, last = rng.choice(inside if inside and rng.random() < 0.7 else everything)
    node: Any = config
    for key in parents:
        node = node[key]
    if isinstance(node, dict) and rng.random() < 0.3:
        del node[last]
    else:
        node[last] = rng.choice([*JUNK, *([node[last] * 2] if isinstance(node[last], int) else [])])
    case.write(config=config)
    found = outcome(case)
    if found is None:
        return
    # What still loads has the undamaged values: an edit may touch how they are used (theta, activations), not them.
    assert finite(found)
    good, now = weights(case.good), weights(found)
    assert good.keys() == now.keys()
    for name in good:
        np.testing.assert_array_equal(now[name], good[name], err_msg=f"{parents} {last}: {name}")


def weights(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every Linear's stored values, whatever is said of its input."""
    layer = tree["layers"]["0"]
    linears = {f"{b}.{k}": v["weight"] for b in ("attn", "mlp") for k, v in layer[b].items()}
    return {
        name: (w.qvalue if isinstance(w, QuantizedTensor) else np.asarray(w, np.float32)).view(np.uint8)
        for name, w in linears.items()
    }


KINDS: list[Callable[[Case, random.Random], None]] = [
    flip_in_header,
    flip_in_data,
    cut_or_grow,
    edit_header,
    edit_config,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_refused_or_harmless(name: str, kind: Callable[[Case, random.Random], None], tmp_path: Path) -> None:
    case = Case(tmp_path, name)
    for seed in range(PER_KIND):
        rng = random.Random(f"{name} {kind.__name__} {seed}")
        try:
            kind(case, rng)
        except AssertionError as error:
            raise AssertionError(f"{name}, {kind.__name__}, seed {seed}: {error}") from error
        except JqserveError:
            raise
        except Exception as error:
            raise AssertionError(f"{name}, {kind.__name__}, seed {seed}: {type(error).__name__} {error}") from error
