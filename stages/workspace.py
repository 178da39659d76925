"""The one folder a run writes to: where each thing lives, and how a file gets there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from stages.errors import UserError
from stages.json_text import indented
from stages.shapes import shaped

SCHEMA = 1
SEAL = "seal"
"""Key of a sealed JSON file that holds the digest of the rest."""
SETTLED = 100_000_000
"""Nanoseconds after which a file's times tell a further write from the last one."""
Stamp: TypeAlias = tuple[int, int, int, int]
T = TypeVar("T")
_hashed: dict[Path, tuple[Stamp, str]] = {}
_read: dict[Path, tuple[Stamp, Any]] = {}
_remembered: list[dict[Path, Any]] = [_hashed, _read]


@dataclass(frozen=True)
class Workspace:
    """Paths below one root; no absolute path is stored in any file there, so the folder can be moved."""

    root: Path

    @property
    def log(self) -> Path:
        """Accepted rows of the log, one Parquet file; its manifest stands beside it."""
        return self.root / "logs" / "log.parquet"

    @property
    def rejects(self) -> Path:
        """Refused rows with file, row number and reason."""
        return self.root / "rejects"

    @property
    def stages(self) -> Path:
        """`stage=NN/events.parquet` and `manifest.json`."""
        return self.root / "stages"

    @property
    def catalogue(self) -> Path:
        """`raw.parquet` as read, `items.parquet` with semantic IDs, `manifest.json`."""
        return self.root / "catalogue"

    @property
    def checkpoints(self) -> Path:
        """One folder a trained stage, named by its commit key."""
        return self.root / "runs" / "checkpoints"

    @property
    def locks(self) -> Path:
        """One file a lineage being trained; never deleted."""
        return self.root / "runs" / "locks"

    @property
    def evaluations(self) -> Path:
        """One Parquet file of per-query metrics a (model, tested stage)."""
        return self.root / "runs" / "evaluations"

    @property
    def reports(self) -> Path:
        """One folder a comparison: report.json, report.html, figures."""
        return self.root / "runs" / "reports"

    @property
    def mlflow_uri(self) -> str:
        """SQLite address of the tracking store."""
        return f"sqlite:///{self.root.resolve() / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Where MLflow keeps files."""
        return self.root / "mlartifacts"

    @property
    def prefect_home(self) -> Path:
        """Prefect's own database and logs."""
        return self.root / "prefect"

    def stage_file(self, index: int) -> Path:
        """The events of one stage."""
        return _place(str(self.root), f"stages/stage={index:02d}/events.parquet")

    def checkpoint(self, key: str) -> Path:
        """The folder of the checkpoint of that name."""
        return _place(str(self.root), f"runs/checkpoints/{key}")

    def file(self, path: str) -> Path:
        """What a manifest names by its path relative to the root."""
        return _place(str(self.root), path)

    def create(self) -> None:
        """Make the folder, for its user alone.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise self._unwritable(error) from None

    def see_place(self) -> None:
        """Refuse a root that is no folder to write to, and cannot become one; nothing is written.

        Raises:
            UserError: it, or what is above it, is a file, a link to nowhere, or somebody else's.
        """
        place = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if os.path.lexists(path))
        code = errno.EACCES if place.is_dir() else errno.ENOTDIR
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise self._unwritable(OSError(code, os.strerror(code)))

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.root}: cannot write the workspace: {error.strerror}; choose another folder")

    def claim(self, name: str) -> None:
        """Create the folder for the experiment called `name`, or check that it is that experiment's.

        Raises:
            UserError: another experiment's or a newer version's workspace, or a folder that cannot be written.
        """
        if self.check(name):
            return
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(self._marker, {"schema": SCHEMA, "name": name})
        except OSError as error:
            raise self._unwritable(error) from None

    def check(self, name: str) -> bool:
        """Whether the folder is claimed already; nothing is written.

        Raises:
            UserError: for another experiment than the one called `name`, or by a newer version.
        """
        found = self._claimed(f"write the name of its experiment anew, which is {name!r}, or choose another workspace")
        if found is not None and found.get("name") != name:
            raise UserError(
                f"{self.root}: workspace of experiment {found.get('name')!r}, not {name!r}; choose another workspace"
            )
        return found is not None

    def see_version(self) -> None:
        """Refuse a folder that this version cannot read, whatever experiment's it is; nothing is written.

        Raises:
            UserError: another version claimed it, or workspace.json is unreadable.
        """
        self._claimed("write the name of its experiment anew, or choose another workspace")

    def _claimed(self, remedy: str) -> dict[str, Any] | None:
        """What workspace.json says, `remedy` being what to do where that is nonsense; None where there is none."""
        if not self._marker.exists():
            return None
        found = shaped(dict[str, Any], read_json(self._marker), self._marker, "not a workspace's name", remedy)
        if found.get("schema") != SCHEMA:
            raise UserError(
                f"{self.root}: workspace schema {found.get('schema')}, this version reads {SCHEMA}; "
                "install the version that made it, or choose another workspace"
            )
        return found

    @property
    def _marker(self) -> Path:
        return self.root / "workspace.json"


@lru_cache(maxsize=1 << 14)
def _place(root: str, below: str) -> Path:
    """One object a place: a long life looks at each stage's file hundreds of times, and making a path takes longer."""
    return Path(root, below)


def temporary_beside(path: Path) -> Path:
    """An unused name on `path`'s own file system that says which process made it: `.tmp-<name>-<pid>-<nonce>`."""
    return path.with_name(f".tmp-{path.name[:180]}-{os.getpid()}-{secrets.token_hex(4)}")


def is_left_over(path: Path) -> bool:
    """Whether `path` is a temporary file or folder whose process is gone; other names are never left over."""
    parts = path.name.rsplit("-", 2)
    if not path.name.startswith(".tmp-") or len(parts) != 3 or not parts[1].isdecimal():
        return False
    try:
        os.kill(int(parts[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    make_folder(path.parent)
    temporary = temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, seal: bool = False) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN is refused.

    Args:
        path: the file.
        value: a JSON value; with `seal` a dict.
        seal: add the value's own digest, by which `read_json` notices a file that rotted.
    """
    if seal:
        value = {**value, SEAL: digest_of(json.loads(json.dumps(value, allow_nan=False)))}
    with replacing(path) as temporary:
        temporary.write_text(indented(value) + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str = "remove it and run the command again that made it") -> Any:
    """Read a JSON file; the seal of a sealed one is checked and left out.

    Args:
        path: the file.
        remedy: what to do where it is no good.

    Raises:
        UserError: it is missing, not JSON, or not what was sealed.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}; {remedy}") from None
    if not (isinstance(value, dict) and SEAL in value):
        return value
    content = {key: part for key, part in value.items() if key != SEAL}
    if digest_of(content) != value[SEAL]:
        raise UserError(f"{path}: altered since it was written; {remedy}")
    return content


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are not there; its own name is durable, too, when this returns."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """`sha256_file`, computed once in this process for as long as the file's number, size and times stay the same."""
    return _once(_hashed, path, sha256_file)


def sha256_if_there(path: Path) -> str | None:
    """`sha256_once`, or None where there is no file."""
    try:
        return sha256_once(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def read_json_once(path: Path) -> Any:
    """`read_json`, once in this process for as long as the file's number, size and times stay the same.

    The next caller gets the same value, so nobody writes to it.

    Raises:
        UserError: as `read_json`.
    """
    return _once(_read, path, read_json)


def _once(known: dict[Path, tuple[Stamp, T]], path: Path, make: Callable[[Path], T]) -> T:
    stamp = stamp_if_there(path)
    found = known.get(path)
    if found is not None and found[0] == stamp:
        return found[1]
    value = make(path)
    if stamp is not None and is_settled(stamp):
        known[path] = stamp, value
    return value


def remember_in(table: dict[Path, Any]) -> None:
    """Let `forget` take entries off a table of what this process knows of files."""
    _remembered.append(table)


def forget(folder: Path) -> None:
    """Drop what this process knows of the files below a folder that is about to go, or its memory would only grow."""
    above = f"{folder}{os.sep}"
    for table in _remembered:
        for path in [path for path in table if path == folder or str(path).startswith(above)]:
            del table[path]


def stamp_of(path: Path | str) -> Stamp:
    """Number, size, and times of last writing and last change (ns) of a file: no write leaves all of them as they are.

    The time of last change cannot be set back.
    """
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp_if_there(path: Path | str) -> Stamp | None:
    """`stamp_of`, or None where nothing is there."""
    try:
        return stamp_of(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_settled(*stamps: Stamp) -> bool:
    """Whether a later write would show in the stamps: the file system's clock moves in steps of milliseconds."""
    return all(time.time_ns() - max(stamp[2:]) > SETTLED for stamp in stamps)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def need_space(folder: Path, size: int) -> None:
    """Refuse to start writing `size` bytes where fewer than twice as many are free.

    Raises:
        UserError: too little space.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise UserError(f"{folder}: {free / 2**20:.0f} MiB free, {2 * size / 2**20:.0f} MiB needed; free some space")
