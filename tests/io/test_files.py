"""Atomic files and folders: what killed writers leave is removed, what living ones write is not."""

import errno
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from speeder.io import files
from speeder.io.files import atomic_folder, atomic_path, recover_folder, safe_name, write_text
from tests.io.killing import killed_at


def write_file(target: Path, content: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(content)
        meanwhile()


def write_folder(target: Path, content: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    with atomic_folder(target, {"a", "b"}) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(content)
        meanwhile()


def content(target: Path) -> set[str]:
    return {path.read_text() for path in (target.iterdir() if target.is_dir() else [target])}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def child(function: Callable[[], None], ends_with: int = 0) -> Iterator[None]:
    """Runs `function` in another process, which is waited for; one that hangs is killed."""
    process = os.fork()
    if process == 0:
        try:
            signal.alarm(60)
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    yield
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == ends_with


write = pytest.mark.parametrize("write", [write_file, write_folder])


@write
def test_the_next_writer_clears_what_killed_ones_left(write: Callable, tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "old")
    for _ in range(3):
        with child(lambda: write(target, "new", kill_self), -signal.SIGKILL):
            pass
        assert content(target) == {"old"}
    assert len(names(tmp_path)) == 3, "each killed writer removes what the one before left"
    write(tmp_path / "out.2", "other")
    assert len(names(tmp_path)) == 4, "another target's may be anyone's"
    write(target, "newest")
    assert names(tmp_path) == ["out", "out.2"] and content(target) == {"newest"}


@write
def test_a_failing_writer_that_is_killed_is_cleared_too(write: Callable, tmp_path: Path) -> None:
    target, touch = tmp_path / "out", 0

    def fail() -> None:
        with suppress(ZeroDivisionError):
            write(target, "new", lambda: 1 / 0)

    while killed_at(touch, fail):
        write(target, "old")
        assert names(tmp_path) == ["out"] and content(target) == {"old"}
        touch += 1
    assert touch > 2 and names(tmp_path) == ["out"]


@write
def test_two_living_writers_both_stay_whole(write: Callable, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (here, there), (resumed, resume) = os.pipe(), os.pipe()

    def wait() -> None:
        os.write(there, b".")
        os.read(resumed, 1)

    with child(lambda: write(target, "theirs", wait)):
        os.read(here, 1)
        write(target, "ours")
        assert content(target) == {"ours"} and len(names(tmp_path)) == 3
        os.write(resume, b".")
    assert content(target) == {"theirs"} and names(tmp_path) == ["out"]
    for end in (here, there, resumed, resume):
        os.close(end)


@write
def test_many_writers_at_once_all_succeed(write: Callable, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def often(text: str) -> None:
        for _ in range(100):
            write(target, text)

    with child(lambda: often("b")), child(lambda: often("c")):
        often("a")
    assert len(content(target)) == 1 and names(tmp_path) == ["out"]


def test_a_folder_that_is_being_swapped_is_not_taken_for_a_killed_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "out", os.replace
    here, there = os.pipe()
    write_folder(target, "old")

    def slow(source: Path, place: Path) -> None:
        real(source, place)
        if Path(source) == target:
            os.write(there, b".")
            time.sleep(0.1)  # long enough for who does not wait

    def swap_slowly() -> None:
        monkeypatch.setattr(os, "replace", slow)
        write_folder(target, "new")

    with child(swap_slowly):
        os.read(here, 1)
        assert content(recover_folder(target)) == {"new"}
    assert names(tmp_path) == ["out"]
    os.close(here)
    os.close(there)


@write
def test_a_lock_that_was_taken_for_abandoned_at_its_birth_is_made_again(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer looks between the making of the lock's file and its locking."""
    target, real = tmp_path / "out", tempfile.mkstemp

    def looked_at(**options: object) -> tuple[int, str]:
        made = real(**options)
        monkeypatch.undo()
        files._remove_abandoned(target)
        assert names(tmp_path) == []
        return made

    monkeypatch.setattr(tempfile, "mkstemp", looked_at)
    seen = []
    write(target, "ours", lambda: seen.extend(names(tmp_path)))
    assert [name[-8:] for name in seen] == [".partial", ".writing"], "both, or a kill would leave one unseen"
    assert content(target) == {"ours"} and names(tmp_path) == ["out"]


@write
def test_without_locks_all_is_written_and_nothing_removed(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    target = tmp_path / "out"
    write(target, "theirs", lambda: write(target, "ours"))
    assert content(target) == {"theirs"} and names(tmp_path) == ["out"]
    with child(lambda: write(target, "killed", kill_self), -signal.SIGKILL):
        pass
    write(target, "ours")
    assert content(target) == {"ours"} and len(names(tmp_path)) == 3


def test_files_that_only_look_alike_are_left(tmp_path: Path) -> None:
    alike = [
        ".out.previous",
        ".out.reading",
        ".out.abcdefgh",
        ".out.x.abcdefgh.writing",
        ".out.abcdefgh.partial",
    ]
    for name in alike:
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "out", "ours")
    assert names(tmp_path) == sorted([*alike, "out"])


def test_names_of_files_are_plain() -> None:
    assert safe_name("+image / 2.0 é") == "_image___2_0_é"
    assert safe_name("a-b c+d", keep="-+") == "a-b_c+d"
