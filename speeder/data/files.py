"""Files that are whole or not there: hashes, atomic files and folders, reproducible JSON."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speeder.errors import SpeederError


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it replaces `path`, otherwise it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        usual_permissions(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def usual_permissions(path: Path) -> None:
    """Gives a file, or a folder and all in it, the permissions that the user's umask asks for.

    Temporary files, and those that safetensors writes, may be read by their owner alone.
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
    """Reads a JSON object; raises `SpeederError` where the file is missing, unreadable or not an object."""
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
    if not folder.exists() and _previous(folder).is_dir():
        os.replace(_previous(folder), folder)
    return folder


def check_owned(folder: Path, owned: set[str]) -> None:
    """Raises `SpeederError` where `folder` is a file, or holds an entry that is not among `owned`."""
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

    The old content stays whole until the new one is complete. `owned` names the entries that may be replaced:
    where `folder` holds anything else, `SpeederError` is raised and nothing is touched, as a swap would lose
    it.
    """
    folder = recover_folder(folder)
    check_owned(folder, owned)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        usual_permissions(temporary)
        previous = _previous(folder)
        if previous.exists():
            shutil.rmtree(previous)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(temporary, folder)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """Size in bytes and SHA-256 of each named file, as a manifest keeps them."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in names
    }


def check_files(folder: Path, files: object, *, verify: bool) -> None:
    """Compares files with a manifest's record: sizes always, hashes where `verify`. Raises `SpeederError`."""
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
