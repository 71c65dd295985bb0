"""The progress display: one line on a terminal, plain lines in a log, and never two bars at once."""

import io
import re
from types import SimpleNamespace

import pytest

from speeder.io import progress
from speeder.io.progress import duration, say, showing


class Terminal(io.StringIO):
    """Takes what is drawn, and says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time as the display sees it, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch, clock):
    """Standard output and error, as a person sees them: both on one screen."""
    screen = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen, stdout=screen))
    return screen


@pytest.fixture
def log(monkeypatch, clock):
    """Both in one file."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=file, stdout=file))
    return file


def drawn(terminal: Terminal) -> list[str]:
    """All that was ever on the screen's lines."""
    return [text.strip() for text in re.split(r"[\r\n]|\x1b\[A", terminal.getvalue()) if text.strip()]


def test_a_terminal_shows_count_facts_and_the_time_left(terminal, clock):
    with showing("text (stage 1 of 3)", 40, "step") as work:
        for _ in range(10):
            clock[0] += 6
            work.update()
            work.tell(loss="4.321")
        last = drawn(terminal)[-1]
    assert last.startswith("text (stage 1 of 3)  step 10/40  ") and last.endswith("  loss 4.321  3 min left")
    assert "\n" not in terminal.getvalue(), "one line, drawn over and over"


def test_steps_before_a_resume_say_nothing_of_the_speed(terminal, clock):
    with showing("training", 40, "step") as work:
        work.skip(20)
        clock[0] += 5
        work.update()
        assert drawn(terminal)[-1].endswith("  2 min left"), "19 steps of 5 seconds"
        assert "step 21/40" in drawn(terminal)[-1]


def test_work_inside_of_work_draws_no_second_bar(terminal, clock):
    with showing("training", 4, "step") as outer:
        clock[0] += 1
        outer.update()
        with showing("ranking test items", 3, "batch") as inner:
            clock[0] += 1
            inner.update()
            assert re.fullmatch(
                r"training  step 1/4 .*  \(ranking test items, batch 1/3\)  6 s left", drawn(terminal)[-1]
            )
        clock[0] += 1
        outer.update()
        assert "ranking" not in drawn(terminal)[-1]
    assert terminal.getvalue().count("\n") == 0


def test_said_lines_stand_alone(terminal, clock):
    with showing("training", 4, "step") as work:
        clock[0] += 1
        work.update()
        say("stage text: done")
        clock[0] += 1
        work.update()
    assert "stage text: done" in terminal.getvalue().replace("\r", "\n").splitlines()
    assert drawn(terminal)[-1].startswith("training  step 2/4"), "the bar is drawn again below"
    assert terminal.getvalue().endswith("\r"), "and is gone in the end"


def test_a_log_gets_a_plain_line_every_fifteen_seconds(log, clock):
    with showing("training", 100, "step") as work:
        for _ in range(100):
            clock[0] += 1
            work.update()
            work.tell(loss="5.000")
            say("a line of another kind") if work.done == 50 else None
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and "a line of another kind" in lines
    told = [line for line in lines if line.startswith("training")]
    assert len(told) == 6
    assert told[1] == "training  step 30/100  loss 5.000  70 s left"


def test_a_log_hears_nothing_of_short_work(log, clock):
    with showing("fetching minilm") as work:
        clock[0] += 14
        work.tell()
    assert log.getvalue() == ""


def test_work_of_unknown_length_shows_how_long_it_takes(terminal, clock):
    with showing("fetching minilm") as work:
        clock[0] += 75
        work.tell()
        assert drawn(terminal)[-1] == "fetching minilm  01:15"


def test_bytes_are_counted_by_thousands(terminal, clock):
    with showing("reading ratings.csv", 3_000_000, "B") as work:
        clock[0] += 1
        work.update(1_500_000)
        assert drawn(terminal)[-1].startswith("reading ratings.csv  1.50M/3.00M  ")


def test_an_error_takes_the_bar_away(terminal):
    with pytest.raises(ValueError, match="stop"), showing("training", 4, "step"):
        raise ValueError("stop")
    with showing("another", 4, "step"):
        assert drawn(terminal)[-1].startswith("another"), "it is the one that is drawn now"


def test_hidden_work_is_neither_drawn_nor_counted_as_inner(terminal):
    with showing("hidden", 4, "step", show=False) as work:
        work.update()
        work.tell(loss="1")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (59, "59 s"), (89.4, "89 s"), (100, "2 min"), (3599, "60 min")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
