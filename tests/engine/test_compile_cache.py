"""Compiled programs between starts: found again when nothing changed, refused where others could have written them."""

from __future__ import annotations

import dataclasses
import os
import random
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jqserve.engine import compile_cache
from jqserve.engine.cache import round_pages
from jqserve.engine.compile_cache import (
    ProgramCache,
    check_private,
    choose_folder,
    compile_lowered,
    environment_facts,
    remembered,
)
from jqserve.errors import CheckpointError


def compiled() -> Any:
    """Never compiled before by anybody, so that it comes from the compiler and not from a cache of JAX's."""
    new = random.SystemRandom().random()
    function = jax.jit(lambda a, b: {"sum": a + b, "pair": (a * b, b), "new": a * new}, donate_argnums=0)
    executable, really = compile_lowered(function.lower(*arguments()))
    assert really
    return executable


def arguments() -> tuple[jax.Array, jax.Array]:
    return jnp.arange(4.0), jnp.full((4,), 3.0)


def test_a_program_comes_back_and_computes_the_same(tmp_path: Path) -> None:
    facts = environment_facts(jax.devices()[0]) | {"model": 1}
    cache = ProgramCache(tmp_path, facts)
    assert cache.load("step") is None
    cache.store("step", compiled())
    again = ProgramCache(tmp_path, facts)
    program = again.load("step")
    assert program is not None and again.hits == 1
    result = program(*arguments())
    assert result["sum"].tolist() == [3, 4, 5, 6] and result["pair"][0].tolist() == [0, 3, 6, 9]


def test_other_facts_are_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = environment_facts(jax.devices()[0])
    ProgramCache(tmp_path, facts | {"leaves": ["float32[4]"]}).store("step", compiled())
    assert ProgramCache(tmp_path, facts | {"leaves": ["float32[5]"]}).load("step") is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_other")
    assert environment_facts(jax.devices()[0]) != facts


def test_the_source_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "SOURCES", ("pallas_kernels",))
    compile_cache.source_digest.cache_clear()
    some = compile_cache.source_digest()
    monkeypatch.undo()
    compile_cache.source_digest.cache_clear()
    assert compile_cache.source_digest() != some


def test_a_broken_entry_is_compiled_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ProgramCache(tmp_path, {})
    cache.store("step", compiled())
    path = cache.folder / "step"
    path.write_bytes(path.read_bytes()[:100])
    assert cache.load("step") is None and "cannot be used" in caplog.text


def test_what_cannot_be_kept_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ProgramCache(tmp_path, {})
    cache.store("step", object())
    assert "cannot be kept" in caplog.text and list(cache.folder.iterdir()) == []


def test_entries_are_the_owners(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, {})
    cache.store("step", compiled())
    assert stat.S_IMODE((cache.folder / "step").stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_a_number_is_remembered(tmp_path: Path) -> None:
    values = iter([7, 8, 9])
    assert [remembered(tmp_path, {"a": 1}, lambda: next(values)) for _ in range(3)] == [7, 7, 7]
    assert remembered(tmp_path, {"a": 2}, lambda: next(values)) == 8
    assert remembered(None, {"a": 1}, lambda: next(values)) == 9


@pytest.mark.parametrize(("pages", "rounded"), [(1, 1), (63, 63), (130, 130), (8191, 8128), (13000, 12928)])
def test_pools_of_almost_the_same_size_are_the_same(pages: int, rounded: int) -> None:
    assert round_pages(pages) == rounded and rounded >= 0.984 * pages


def test_off_and_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_folder("off", "gpu") is None and choose_folder(None, "cpu") is None
    assert choose_folder(None, "gpu") == tmp_path / ".cache/jqserve/programs"
    made = choose_folder(str(tmp_path / "a" / "b"), "cpu")
    assert made == tmp_path / "a" / "b" and stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CheckpointError, match=r"run as code.*--compilation-cache-dir off"):
        choose_folder(str(folder), "cpu")


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(CheckpointError, match="others than you"):
        choose_folder(str(tmp_path / "link"), "cpu")


def test_a_folder_below_one_that_all_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "mine").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(CheckpointError, match="everybody may replace it"):
        check_private(tmp_path / "open" / "mine")
    (tmp_path / "open").chmod(0o1777)  # as /tmp: only the owner may rename or remove
    check_private(tmp_path / "open" / "mine")


def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(CheckpointError, match="belongs to user"):
        choose_folder(str(tmp_path), "cpu")


def test_what_jax_found_in_its_cache_is_told() -> None:
    class Lowered:
        def __init__(self, event: str) -> None:
            self.event = event

        def compile(self, options: Any) -> str:
            assert options["xla_gpu_autotune_level"] == 0
            jax.monitoring.record_event(self.event)
            return "executable"

    assert compile_lowered(Lowered("/jax/compilation_cache/cache_hits")) == ("executable", False)  # type: ignore
    assert compile_lowered(Lowered("/jax/compilation_cache/cache_misses")) == ("executable", True)  # type: ignore


def test_an_engine_starts_from_the_cache(tmp_path: Path, model: Any, params: Any) -> None:
    """The second engine compiles nothing and gives the same tokens."""
    from jqserve.engine.assemble import assemble
    from jqserve.engine.config import EngineConfig
    from jqserve.engine.variant import Variant
    from tests.engine.conftest import complete, request

    # An odd epsilon: programs that no cache of JAX's can know.
    model = dataclasses.replace(model, norm_eps=1e-5 * (1 + random.SystemRandom().random()))
    config = EngineConfig(max_running_requests=2, context_length=64, chunked_prefill_size=16, tile_size=16, page_size=8)
    outcomes, compilations = [], []
    for _ in range(2):
        engine = assemble(config, model, params, programs=tmp_path)
        engine.runner.programs.variants = (Variant.GREEDY,)  # the one that compiles fastest
        engine.runner.warm_up()
        outcomes.append(complete(engine, [request(0, 20), request(1, 9)]))
        compilations.append(engine.runner.compilations)
    assert compilations[0] >= 2 and compilations[1] == 0
    assert [o.tokens for o in outcomes[0].values()] == [o.tokens for o in outcomes[1].values()]
