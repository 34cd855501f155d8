"""The hidden directory beside the output in which a run works, and from which a later run goes on.

    .NAME.quantizing/job.json          what is being made: options, source, data; a run with other ones does not go on
    .NAME.quantizing/piece-00003.*     a finished piece (a layer): its tensors, and JSON with checksums and its report
    .NAME.quantizing/out/              the output while it is put together; renamed to NAME when all of it is on disk

No name in it is one that a loader looks for until `out` is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from jqserve.errors import CheckpointError
from jqserve.quantize.files import sha256, sync_directory, write_json, write_safetensors
from jqserve.quantize.formats.format import Tensors


class Workplace:
    """Raises CheckpointError when `out` exists, when another run works here, or when what is here belongs to another
    job and `restart` was not asked for."""

    def __init__(self, out: Path, job: dict[str, Any], *, restart: bool = False) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.quantizing"
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"{out}: exists and is not an empty directory; choose another --out")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise CheckpointError(f"{self.path}: another run is at work here; wait for it or stop it") from None
        try:
            self._agree(job, restart)
        except OSError as error:
            os.close(self._lock)
            raise self._unusable(error) from error
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        os.close(self._lock)

    def _unusable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the directory in which a run works, beside --out, could not be written: "
            f"{error.strerror or error}"
        )

    def _agree(self, job: dict[str, Any], restart: bool) -> None:
        path = self.path / "job.json"
        found = _read(path)
        if found == job:
            return
        if found is not None and not restart:
            keys = sorted(key for key in {*found, *job} if found.get(key) != job.get(key))
            raise CheckpointError(
                f"{self.path}: holds an unfinished run that differs in: {', '.join(keys)}. Repeat that run's command "
                "to go on with it, or add --restart to throw it away"
            )
        for child in self.path.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        write_json(path, job)

    def piece(self, index: int) -> Path:
        return self.path / f"piece-{index:05d}.tensors"

    def keep(self, index: int, tensors: Tensors, report: Any) -> None:
        """Writes a finished piece; it counts from the moment its JSON is there."""
        digest = write_safetensors(self.piece(index), tensors)
        about = {"sha256": digest, "report": report, "report_sha256": _digest(report)}
        write_json(self.piece(index).with_suffix(".json"), about)

    def finished(self, index: int) -> dict[str, Any] | None:
        """The JSON of a piece that is there and whole, by the checksums of both files; else None."""
        found = _read(self.piece(index).with_suffix(".json"))
        if found is None or found.get("report_sha256") != _digest(found.get("report")):
            return None
        whole = self.piece(index).is_file() and sha256(self.piece(index)) == found.get("sha256")
        return found if whole else None

    def new_output(self) -> Path:
        """An empty directory for the output."""
        path = self.path / "out"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def publish(self) -> None:
        """The output gets its name, in one step, and the rest is removed."""
        sync_directory(self.path / "out")
        os.rename(self.path / "out", self.out)
        sync_directory(self.out.parent)
        shutil.rmtree(self.path, ignore_errors=True)


def _digest(report: Any) -> str:
    return hashlib.sha256(json.dumps(report).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
