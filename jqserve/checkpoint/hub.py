"""`--model-path`: a local directory, or the id of a model on the Hugging Face Hub, resolved to a local directory."""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jqserve.checkpoint.header_file import headers_of_config, link_side_files, write_header
from jqserve.checkpoint.hf import INDEX, SINGLE, read_json
from jqserve.errors import CheckpointError, JqserveError, UnsupportedError

#: What is fetched: weights without code (no pickles, no python), configuration, tokenizer, chat template.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
#: consolidated*: Mistral's second copy of the weights. original/: Meta's.
IGNORED = ["consolidated*", "original/*", "metal/*", "onnx/*"]
#: Requests for headers at a time.
FETCHERS = 8
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model_path: str, revision: str | None = None, *, weights: bool = True) -> str:
    """A directory that exists, for a path or a Hub id ("org/name"); the Hub's files go to (and come from) its cache.

    weights=False (dummy weights, plans from configs) leaves the safetensors where they are.
    Raises CheckpointError where nothing is found, or the Hub cannot be reached and the cache has no copy;
    UnsupportedError for a single file.
    """
    if not model_path:  # a variable of the shell that is not set: not the working directory
        raise CheckpointError("the model's path is empty; give a directory or a Hub id")
    path = Path(model_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"--revision {revision}: {model_path} is a local directory, which has no revisions")
        return str(path)
    if path.is_file() and path.suffix == ".gguf" and revision is None:
        return str(path)
    if path.is_file():
        raise UnsupportedError(
            f"{model_path}: a single file is not a checkpoint; --model-path takes a directory of safetensors, a .gguf "
            "file, or a Hub id"
        )
    if model_path.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(model_path):
        raise CheckpointError(f"{model_path}: no such directory (and not the shape of a Hub id, org/name)")
    return _from_hub(model_path, revision, PATTERNS if weights else PATTERNS[1:])


@contextlib.contextmanager
def planned(model_path: str, revision: str | None = None, *, weights: bool = True) -> Iterator[str]:
    """As `resolve`, for a plan: of a model on the Hub that is not in the cache only the headers of the weights are
    fetched, by requests for ranges, into a directory that is gone afterwards (`header_file`).

    weights=False (--load-format dummy): config.json alone tells what the weights would be.
    """
    with tempfile.TemporaryDirectory(prefix="jqserve-plan-") as folder:
        try:
            if not weights:
                directory = resolve(model_path, revision, weights=False)
                headers_of_config(Path(directory), Path(folder))
                yield folder
            elif Path(model_path).expanduser().exists() or not _HUB_ID.fullmatch(model_path):
                yield resolve(model_path, revision)
            elif cached := _whole_in_cache(model_path, revision):
                yield cached
            else:
                snapshot = Path(resolve(model_path, revision, weights=False))
                link_side_files(snapshot, Path(folder))
                with _told(model_path, revision):
                    _fetch_headers(model_path, snapshot.name, Path(folder))  # of the commit that it is named after
                yield folder
        except JqserveError as error:  # whose commands are to work when the folder is gone
            error.args = (str(error).replace(folder, model_path),)
            raise


def _whole_in_cache(repo: str, revision: str | None) -> str | None:
    """The cached directory, if all that its index names is there."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError, ValueError):
        return None
    folder = Path(found)
    if not (folder / INDEX).exists():
        return found if any(folder.glob("*.safetensors")) else None
    return found if all((folder / name).exists() for name in _weight_files(folder)) else None


def _weight_files(directory: Path) -> list[str]:
    """By the index, or the one file. Names that are no plain ones are left to `Checkpoint`, which refuses them."""
    index = directory / INDEX
    names = read_json(index).get("weight_map") if index.exists() else {SINGLE: SINGLE}
    if not isinstance(names, dict):
        return []
    return sorted({name for name in names.values() if isinstance(name, str) and Path(name).name == name})


def _fetch_headers(repo: str, revision: str, into: Path) -> None:
    import huggingface_hub

    api = huggingface_hub.HfApi()

    def fetch(name: str) -> None:
        found = api.parse_safetensors_file_metadata(repo, name, revision=revision)
        tensors = sorted(found.tensors.items(), key=lambda item: item[1].data_offsets)
        write_header(into / name, {tensor: (info.dtype, tuple(info.shape)) for tensor, info in tensors})

    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="headers") as pool:
        list(pool.map(fetch, _weight_files(into)))


def _from_hub(repo: str, revision: str | None, patterns: list[str]) -> str:
    import huggingface_hub

    with _told(repo, revision):
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED
        )
    if patterns is PATTERNS and not any(Path(found).glob("*.safetensors")):
        _check_not_gguf(repo, revision)
    return found


def _check_not_gguf(repo: str, revision: str | None) -> None:
    """Raises UnsupportedError for a repository of GGUF files: it has one for each size, and which is wanted nobody can
    know. Called where there are no safetensors; what the Hub does not tell then changes nothing."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # offline, or refused: the caller's own error says so
        return
    found = sorted(name for name in names if name.endswith(".gguf"))
    if not found or any(name.endswith(".safetensors") for name in names):
        return
    chosen = next((name for name in found if "q4_k_m" in name.lower()), found[0])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise UnsupportedError(
        f"{repo}: holds GGUF files ({', '.join(found[:5])}{more}) and no safetensors: `hf download {repo} "
        f"{shlex.quote(chosen)} --local-dir DIR`, then --model-path {shlex.quote(f'DIR/{chosen}')}"
    )


@contextlib.contextmanager
def _told(repo: str, revision: str | None) -> Iterator[None]:
    """What the Hub, or the way to it, refuses becomes a CheckpointError that says what to do."""
    from huggingface_hub import errors

    network: type[Exception] = errors.HfHubHTTPError.__mro__[
        1
    ]  # HTTPError of httpx or of httpx2, by the version: what sockets raise
    at = f"{repo} at revision {revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at}: the Hub grants access only after its terms are accepted, at https://huggingface.co/{repo}; then "
            "log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo}: the Hub has no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: neither a directory here nor a model on the Hub (or it is private: `hf auth login`)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{at}: not a directory here, not in the Hugging Face cache, and the Hub cannot be reached (offline, or "
            f"HF_HUB_OFFLINE is set); on a machine with network run `hf download {repo}` and copy the directory"
        ) from error
    except JqserveError:
        raise
    except (errors.EntryNotFoundError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
        _check_not_gguf(repo, revision)
        raise CheckpointError(f"{at}: has no safetensors that can be read: {str(error).splitlines()[0]}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, network, OSError, ValueError) as error:
        raise CheckpointError(f"{at}: the Hub's answer cannot be used: {str(error).splitlines()[0]}") from error
