"""One progress display for all work: a bar of tqdm's on a terminal, elsewhere a plain line every 15 seconds.

Only one is drawn at a time. Nested work, such as a ranking during training, is shown at the end of the outer line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from tqdm import tqdm

LINE_SECONDS = 15  # between two lines where there is no terminal
_COUNTED = "{desc}  {unit} {n_fmt}/{total_fmt}  {bar:20}{facts}{left}"
_COUNTED_LINE = "{desc}  {unit} {n_fmt}/{total_fmt}{facts}{left}"
_UNCOUNTED = "{desc}{facts}  {elapsed}"

_open: list[Progress] = []  # the one that is drawn, and those inside of it


class Progress:
    """The progress of a task; `showing` makes one.

    Attributes:
        description: the task.
        done: number of finished units, of `total`.
        facts: shown after the count, such as a loss.
    """

    def __init__(self, description: str, total: float | None, unit: str, initial: float):
        self.description, self.total, self.unit, self.done = description, total, unit, initial
        self.facts: dict[str, str] = {}
        self._bar: _Bar | None = None

    def update(self, count: float = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self._bar is not None:
            self._bar.n += count
        self._redraw()

    def skip(self, count: float) -> None:
        """Count units that were done before this task began, which do not count for its speed."""
        self.done += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.n += count
            self._bar.last_print_n += count
        self._redraw()

    def tell(self, description: str | None = None, **facts: str) -> None:
        """Set the description, or facts, which stay on the line until they change."""
        self.description = self.description if description is None else description
        self.facts |= facts
        self._redraw()

    def draw(self, initial: float) -> None:
        """Become the one that is drawn."""
        on_terminal = sys.stderr.isatty()
        form = _UNCOUNTED if self.total is None else _COUNTED if on_terminal else _COUNTED_LINE
        if self.unit in ("", "B"):  # the numbers of bytes have their own letters
            form = form.replace("{unit} ", "")
        self._bar = (_Bar if on_terminal else _Lines)(
            desc=self.description,
            total=self.total,
            unit=self.unit,
            unit_scale=self.unit == "B",
            initial=initial,
            bar_format=form,
            file=sys.stderr,
            leave=False,
            dynamic_ncols=True,
            miniters=0,  # by time alone
        )

    def close(self) -> None:
        """Remove it from the screen."""
        if self._bar is not None:
            self._bar.close()
        self._redraw()

    def _redraw(self) -> None:
        """Update the bar's text; the bar decides when to draw."""
        drawn = _open[0] if _open else None
        if drawn is None or drawn._bar is None:
            return
        facts = "".join(f"  {name} {value}" for name, value in drawn.facts.items())
        inner = _open[-1]
        if inner is not drawn:
            count = f", {inner.unit} {inner.done:g}/{inner.total:g}" if inner.total else ""
            facts += f"  ({inner.description}{count})"
        drawn._bar.set_description_str(drawn.description, refresh=False)
        drawn._bar.facts = facts
        drawn._bar.update(0)  # draws where the last drawing is long enough ago


class _Bar(tqdm):
    """A tqdm bar with facts, and with the time left in words."""

    facts = ""

    @property
    def format_dict(self) -> dict:
        told = super().format_dict
        done, left = told["n"] - self.initial, ""
        if told["total"] and done > 0:
            left = f"  {duration(told['elapsed'] * (told['total'] - told['n']) / done)} left"
        return told | {"left": left, "facts": self.facts}


class _Lines(_Bar):
    """The same as lines of a log: nothing is drawn over, and no line comes within 15 seconds of another."""

    monitor_interval = 0  # no thread that draws from time to time

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = monotonic()
        self._last = getattr(self, "_last", now)
        if msg is None and now - self._last >= LINE_SECONDS:
            self._last = now
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Lines stay."""


@contextmanager
def showing(
    description: str, total: float | None = None, unit: str = "", *, initial: float = 0, show: bool = True
) -> Iterator[Progress]:
    """Show how far a piece of work is while the block runs.

    Args:
        description: what is worked on.
        total: of units; None where it is not known.
        unit: such as "step"; "B" for bytes.
        initial: units done before, which do not count for the time left.
        show: False draws nothing.
    """
    work = Progress(description, total, unit, initial)
    if not show:
        yield work
        return
    _open.append(work)
    if len(_open) == 1:
        work.draw(initial)
    try:
        yield work
    finally:
        _open.remove(work)
        work.close()


def say(text: str = "") -> None:
    """Print lines for the user, above the progress display where there is one."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, file=sys.stdout, flush=True)


def duration(seconds: float) -> str:
    """Such as "40 s" or "3 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
