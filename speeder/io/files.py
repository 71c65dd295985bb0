"""Atomic files and folders, which are whole or absent; hashes; reproducible JSON.

A half-written target is beside it as `.TARGET.xxxxxxxx.partial`, and its writer holds a lock (flock) on
`.TARGET.xxxxxxxx.writing`. A killed writer holds no lock, so the next writer of the same target removes both.
Locks must work between all machines that share the folder, as on NFS, CephFS, and Lustre mounted with `flock`. If they
work on one machine only (NFS with `local_lock` or `nolock`, Lustre with `localflock`), two machines must not write one
target at the same time. Without locks, nothing is removed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from speeder.errors import SpeederError
from speeder.io.disk_full import writing


def safe_name(name: str, keep: str = "-_") -> str:
    """`name` as part of a file name: everything except letters, digits and the characters of `keep` becomes `_`."""
    return "".join(letter if letter.isalnum() or letter in keep else "_" for letter in name)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _place_beside(target: Path, named: Path | None = None) -> Iterator[Path]:
    """A path that is free for what shall replace `target`; what is there in the end, or when killed, is removed.

    Raises `WriteError`, naming the target (or `named`), if the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    with writing(named or target):
        lock, handle = _new_lock(target)
    place = lock.with_suffix(".partial")
    try:
        with writing(named or target):
            yield place
    finally:  # The lock is removed last: a partial file without a lock would never be found.
        with suppress(OSError):
            _remove(place)
            lock.unlink()
        os.close(handle)


def _new_lock(target: Path) -> tuple[Path, int]:
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".writing", dir=target.parent)
        _lock(handle)
        if _is_at(handle, name):
            return Path(name), handle
        os.close(handle)  # Another writer found it before it was locked, and removed it as abandoned.


def _remove_abandoned(target: Path) -> None:
    ours = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.writing")
    for name in filter(ours.fullmatch, os.listdir(target.parent)):
        lock = target.parent / name
        with suppress(OSError):  # Its writer lives; or it is gone, another user's, or there are no locks.
            handle = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(handle, lock):
                    _remove(lock.with_suffix(".partial"))
                    lock.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> None:
    """Waits for the lock, which lasts until `handle` is closed or the process ends, however it ends."""
    with suppress(OSError):  # No locks on this file system: then no other process can have one either.
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_at(handle: int, path: str | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:  # On NFS also that the handle is stale.
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it replaces `path`, otherwise it is removed.

    Several processes may write the same `path` at once: the last to finish stays.
    """
    path = Path(path)
    with _place_beside(path) as temporary:
        temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        usual_permissions(temporary)
        os.replace(temporary, path)


def usual_permissions(path: Path) -> None:
    """Gives a file, or a folder and everything in it, the permissions of the user's umask.

    Temporary files, and those that safetensors writes, are readable only by their owner.
    """
    umask = os.umask(0)
    os.umask(umask)
    for entry in [path, *path.rglob("*")]:
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object) -> None:
    """Writes `content` as readable JSON, atomically; the same content gives the same bytes."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict:
    """Reads a JSON object; raises `SpeederError` if the file is missing, unreadable or not an object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpeederError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise SpeederError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SpeederError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def recover_folder(folder: str | Path) -> Path:
    """The folder itself, after undoing an `atomic_folder` that was killed between its two renames."""
    folder = Path(folder)
    folder = folder if folder.name else folder.resolve()
    if _is_between_renames(folder):
        with _swap_lock(folder):
            if _is_between_renames(folder):  # Still, so no running process is about to do the second rename.
                os.replace(_previous(folder), folder)
    return folder


def _is_between_renames(folder: Path) -> bool:
    return not folder.exists() and _previous(folder).is_dir()


@contextmanager
def _swap_lock(folder: Path) -> Iterator[None]:
    """A lock of one process at a time: while a folder is swapped, there is none under its name."""
    lock = folder.with_name(f".{folder.name}.swap")
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(handle)
        if _is_at(handle, lock):
            break
        os.close(handle)  # Its last holder has removed it.
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def check_owned(folder: Path, owned: set[str]) -> None:
    """Raises `SpeederError` if `folder` is a file, or has an entry that is not in `owned`."""
    if folder.exists():
        if not folder.is_dir():
            raise SpeederError(f"cannot save to {folder}: it is a file, and a folder was expected")
        strangers = sorted({entry.name for entry in folder.iterdir()} - owned)
        if strangers:
            raise SpeederError(
                f"cannot save to {folder}: it holds {strangers[0]!r}, which is not part of what is saved"
                " there; choose an empty folder"
            )


@contextmanager
def atomic_folder(folder: str | Path, owned: set[str]) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of `folder` on a clean exit.

    The old content stays whole until the new one is complete. `owned` names the entries that may be replaced. If
    `folder` has anything else, `SpeederError` is raised and nothing is touched, as a swap would lose it. Several
    processes may write the same folder at once: the last to finish stays.
    """
    folder = recover_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _swap_lock(folder):
        check_owned(folder, owned)
    with _place_beside(folder) as temporary:
        temporary.mkdir(mode=0o700)
        yield temporary
        usual_permissions(temporary)
        with _swap_lock(folder):
            _swap(temporary, folder)


@contextmanager
def replaced_files(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder; its files then replace those of the same names in `folder`, and others stay.

    Each file is replaced whole, and none before all are written, so a full disk changes nothing.
    """
    folder = Path(folder)
    with _place_beside(folder / "files", named=folder) as temporary:
        temporary.mkdir(mode=0o700)
        yield temporary
        usual_permissions(temporary)
        for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def _swap(new: Path, folder: Path) -> None:
    previous = _previous(folder)
    if folder.exists():
        if previous.exists():
            shutil.rmtree(previous)
        os.replace(folder, previous)
    os.replace(new, folder)
    shutil.rmtree(previous, ignore_errors=True)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """Size in bytes and SHA-256 of each named file, for a manifest."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in names
    }


def check_files(folder: Path, files: object, *, verify: bool) -> None:
    """Compares files with a manifest's record: sizes always, hashes with `verify`. Raises `SpeederError`."""
    if not isinstance(files, dict):
        raise SpeederError(f"{folder / 'manifest.json'} lists no files")
    for name, record in files.items():
        path = folder / name
        if not isinstance(record, dict) or not {"bytes", "sha256"} <= record.keys():
            raise SpeederError(f"{folder / 'manifest.json'} has no size and hash of {name}")
        if not path.is_file():
            raise SpeederError(f"{path} is missing")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise SpeederError(f"{path} has {size} bytes, but its manifest says {record['bytes']}")
        if verify and sha256_file(path) != record["sha256"]:
            raise SpeederError(f"{path} has changed: its SHA-256 is not the one in its manifest")
