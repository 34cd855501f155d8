"""An 8B layer is quantized in as much device memory as the design allows: `memory_bound`, 5.36 GiB.

What AWQ holds at its peak is told in jqserve/quantize/layer.py: 4.82 GiB. At 8c3f1d6, before the host was kept near
the device, an H200 peaked at 6.19, and this sum says 7.5: the 32 chunks (4.0 GiB) from which the search's sample is
picked could all lie there beside the layer (0.81), the second moments (0.95) and what was picked (0.5), and still did
when the search began. While moments were summed two chunks with all their inputs lay there: 6.0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bench.quantize_shape import random_layer
from jqserve.quantize import awq
from jqserve.quantize.activations import Activations
from jqserve.quantize.layer import LayerQuantizer
from jqserve.quantize.memory import memory_bound
from jqserve.quantize.options import CHUNK_TOKENS, Options
from tests.quantize.device_memory import FULL, SCALE, SMALL, Ledger

SEQLEN = 2048


def test_awq_of_an_8b_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 0.3 GiB below the bound, for what the allocator makes of it. Three scales are tried instead of 40, of
    which two are in memory."""
    monkeypatch.setattr(awq, "STEPS", 2)
    options = Options("awq", search_tokens=65536 // SCALE)
    rng = np.random.default_rng(0)
    samples, seqlen = CHUNK_TOKENS // SEQLEN, SEQLEN // SCALE
    chunk = rng.standard_normal((samples, seqlen, SMALL.hidden_size), np.float32).astype(ml_dtypes.bfloat16)
    quantizer = LayerQuantizer(SMALL, options, options.grid("float16"), "float16")
    layer = random_layer(SMALL, 0)
    ledger = Ledger()
    ledger.watch(monkeypatch)
    quantizer.run(layer, None, Activations([chunk] * 32))
    bound = memory_bound(FULL, samples * SEQLEN, chunk.dtype.itemsize)
    assert ledger.peak().total < bound - 0.3 * 2**30, "\n".join(map(str, ledger.summary()))
