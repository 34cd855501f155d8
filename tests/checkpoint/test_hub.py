"""--model-path: directories, Hub ids from the cache, clear words where there is neither. No test reaches a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jqserve.checkpoint import hub
from jqserve.errors import CheckpointError, JqserveError, UnsupportedError


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == str(tmp_path)


REFUSED: dict[str, tuple[str, str | None, type[JqserveError], str]] = {
    "absolute path": ("/no/such/place", None, CheckpointError, "no such directory"),
    "relative path": ("./no-such-place", None, CheckpointError, "no such directory"),
    "too many parts": ("a/b/c", None, CheckpointError, "no such directory"),
    "offline": ("org/no-such-model", None, CheckpointError, "cannot be reached.*hf download org/no-such-model"),
    "offline, revision": ("org/no-such-model", "v2", CheckpointError, "org/no-such-model at revision v2.*offline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, revision, kind, words = REFUSED[case]
    offline(monkeypatch, tmp_path)
    with pytest.raises(kind, match=words):
        hub.resolve(name, revision)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_a_file_and_a_revision_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert hub.resolve(str(tmp_path / "x.gguf")) == str(tmp_path / "x.gguf")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"a \.gguf file, or a Hub id"):
        hub.resolve(str(tmp_path / "x.bin"))
    with pytest.raises(CheckpointError, match=r"--revision main.*no revisions"):
        hub.resolve(str(tmp_path), "main")


def test_a_cached_model_is_found_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch, tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert Path(hub.resolve("org/name")) == snapshot
    assert Path(hub.resolve("org/name", commit)) == snapshot


def test_only_weights_and_configuration_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **how: asked.update(how) or "/there")
    assert hub.resolve("org/name", "abc") == "/there"
    assert asked["revision"] == "abc"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(p.endswith((".bin", ".pt", ".py")) for p in asked["allow_patterns"])
    hub.resolve("org/name", weights=False)
    assert "*.json" in asked["allow_patterns"] and "*.safetensors" not in asked["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "neither a directory here nor a model on the Hub"),
        ("GatedRepoError", "accepted, at https://huggingface.co/org/name.*hf auth login"),
        ("RevisionNotFoundError", "no revision 'r'"),
        ("HfHubHTTPError", "cannot be used: 500"),
    ],
)
def test_what_the_hub_answers(error: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(repo: str, **how: Any) -> str:
        raised = kind.__new__(kind)  # its own constructor wants the answer of a server
        Exception.__init__(raised, "500 Internal")
        raised.args = ("500 Internal",)
        raised.request_id = raised.server_message = None
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=words):
        hub.resolve("org/name", "r")
