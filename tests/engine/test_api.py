"""`jqserve.Engine`: what it takes, and what it refuses before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jqserve.engine import load
from jqserve.engine.api import Engine
from jqserve.engine.config import EngineConfig
from jqserve.engine.request import SamplingParams
from jqserve.errors import RequestError, UnsupportedError
from tests.checkpoint import gguf_files, tiny

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=2)


@pytest.fixture(scope="module")
def engine(demo_dir: Path) -> Engine:
    """Its seeds are above 64 bits, and it queues nothing."""
    return Engine(
        str(demo_dir), max_running_requests=2, max_queued=0, context_length=64, num_pages=8, random_seed=2**40
    )


def test_more_prompts_than_are_taken_at_once(engine: Engine) -> None:
    prompts = [[5, 6], np.array([7, 8, 9]), "one", [5, 6]]
    done = engine.generate(prompts, GREEDY, progress=False)
    assert [len(completion.token_ids) for completion in done] == [2] * 4
    assert done[0].token_ids == done[3].token_ids and done[1].prompt_ids == (7, 8, 9)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a dict": ("x", {"temperature": 0}, r"sampling: found a dict; expected SamplingParams"),
    "a dict among them": (["x", "y"], [GREEDY, {}], r"sampling: found a dict"),
    "too few": (["x", "y"], [GREEDY], r"sampling: 1 for 2 prompts"),
    "half a pair": (["x", "\ud83d y"], GREEDY, r"prompt: holds half of a surrogate pair, no character \(prompt 1\)"),
    "half a token": (
        [[5, 6.5]],
        GREEDY,
        r"prompt: found \[5, 6.5\]; expected text, chat messages or token ids \(prompt 0\)",
    ),
    "no prompt": (["x", None], GREEDY, r"prompt: found None; .*\(prompt 1\)"),
    "one stop string": ("x", SamplingParams(stop="abc"), r"stop: is one string; give a tuple of them: \('abc',\)"),  # type: ignore[arg-type]
    "nothing": (None, GREEDY, r"prompts: found None; expected text, token ids, or a list"),
    "a schema": (
        "x",
        SamplingParams(constraint=("json_schema", {})),
        r"constraint: found \('json_schema', \{\}\); .*json.dumps",
    ),  # type: ignore[arg-type]
    "a constraint": ("x", SamplingParams(constraint=7), r"constraint: found 7; expected a pair of texts"),  # type: ignore[arg-type]
    "no new token": ("x", SamplingParams(max_new_tokens=0), r"max_new_tokens: 0 is less than 1"),
    "biases": ("x", SamplingParams(logit_bias={5: 1.0}), r"logit_bias: is a dict; give pairs"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_not_guessed(engine: Engine, case: str) -> None:
    prompts, sampling, words = REFUSED[case]
    with pytest.raises(RequestError, match=words):
        engine.generate(prompts, sampling, progress=False)
    assert not engine.core.has_work()


def test_chat_messages_as_the_client_takes_them(engine: Engine) -> None:
    """Rendered text would be encoded with a second bos, and a bare question is none to a chat model."""
    question = [{"role": "user", "content": "What is 463 + 88?"}]
    sampling = SamplingParams(temperature=0.0, max_new_tokens=8)
    (alone,) = engine.generate(question, sampling, progress=False)
    among, _ = engine.generate([question, "x"], sampling, progress=False)
    assert alone.text == among.text == "551" and alone.prompt_ids.count(1) == 1


def test_chat_messages_that_no_template_takes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"chat template does not accept these messages: .*\(prompt 1\)"):
        engine.generate(["x", [{"role": "user"}]], GREEDY, progress=False)
    monkeypatch.setattr(engine._chats, "chat", None)
    with pytest.raises(RequestError, match="has no chat template; give text or token ids"):
        engine.generate([{"role": "user", "content": "x"}], GREEDY, progress=False)


def test_a_prompt_that_fails_later_is_named_by_its_place(engine: Engine) -> None:
    """And not by the number that the engine has given it, which counts every prompt since it was made."""
    engine.generate([[5, 6]] * 3, GREEDY, progress=False)
    broken = SamplingParams(max_new_tokens=2, constraint=("regex", "[0-9"))
    with pytest.raises(RequestError, match=r"constraint: regex cannot be used.*\(prompt 1\)"):
        engine.generate(["x", "y"], [GREEDY, broken], progress=False)


def test_an_unknown_option_is_told_with_those_that_there_are() -> None:
    with pytest.raises(TypeError, match=r"unknown engine options max_num_seqs; known: .*max_running_requests"):
        Engine("/absent", max_num_seqs=3)


def test_dtypes_of_jax_are_taken(demo_dir: Path) -> None:
    engine = Engine(str(demo_dir), dtype=jnp.bfloat16, max_running_requests=1, context_length=64, num_pages=8)
    assert engine.config.dtype == "bfloat16"


def test_what_would_have_no_effect_is_refused(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA has read its flags: an ablation without CUDA graphs would measure them."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(
        UnsupportedError, match=r"disable_cuda_graph has no effect here.*XLA_FLAGS=--xla_gpu_enable_com"
    ):
        Engine(str(demo_dir), disable_cuda_graph=True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    Engine(str(demo_dir), disable_cuda_graph=True, max_running_requests=1, context_length=64, num_pages=8)


def test_a_context_beyond_the_models_is_refused_before_anything_loads(
    demo_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_checkpoint", lambda *_, **__: pytest.fail("it loads"))
    with pytest.raises(UnsupportedError, match="context_length 99999 is more than the model's 2048 positions"):
        Engine(str(demo_dir), context_length=99_999)


@pytest.mark.parametrize("how", ["argument", "field", "gguf"])
def test_a_tokenizer_from_elsewhere_also_serves_grammars(how: str, demo_dir: Path, tmp_path: Path) -> None:
    """In the model's own directory there is none, or it is a file."""
    names = ["tokenizer.json", "tokenizer_config.json"]
    if how == "gguf":
        model = gguf_files.write(tmp_path / "model.gguf", "F16")
        for name in names:
            shutil.copy(demo_dir / name, tmp_path)
    else:
        model = tiny.make(tmp_path, vocab_size=4096).path
    options: dict[str, Any] = {} if how == "gguf" else {"tokenizer_path": str(demo_dir)}
    given: Any = str(model)
    if how == "field":
        given, options = EngineConfig(model_path=str(model), disable_warmup=True, **options), {}
    engine = Engine(given, max_running_requests=2, num_pages=8, **options)
    assert engine.tokenizer.encode("a") and engine.core.model_info()["constraints"]
    assert engine.config.tokenizer_path == str(tmp_path if how == "gguf" else demo_dir)
