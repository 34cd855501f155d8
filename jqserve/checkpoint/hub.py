"""`--model-path`: a local directory, or the id of a model on the Hugging Face Hub, resolved to a local directory."""

from __future__ import annotations

import re
from pathlib import Path

from jqserve.errors import CheckpointError, UnsupportedError

#: What is fetched: weights without code (no pickles, no python), configuration, tokenizer, chat template.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
#: consolidated*: Mistral's second copy of the weights. original/: Meta's.
IGNORED = ["consolidated*", "original/*", "metal/*", "onnx/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(model_path: str, revision: str | None = None, *, weights: bool = True) -> str:
    """A directory that exists, for a path or a Hub id ("org/name"); the Hub's files go to (and come from) its cache.

    weights=False (dummy weights, plans from configs) leaves the safetensors where they are.
    Raises CheckpointError where nothing is found, or the Hub cannot be reached and the cache has no copy;
    UnsupportedError for a single file.
    """
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


def _from_hub(repo: str, revision: str | None, patterns: list[str]) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{repo} at revision {revision}" if revision else repo
    try:
        return huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED
        )
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
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(f"{at}: the Hub's answer cannot be used: {str(error).splitlines()[0]}") from error
