"""How far a long run is, and how much time is left."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["SILENT", "Bar", "Progress", "status"]

#: What is over sooner says nothing in a terminal.
PATIENCE_S = 2.0
#: How often a terminal's line is drawn anew.
EVERY_S = 0.5


class Progress:
    """Hears what a run does; this one says nothing."""

    def begin(self, total: int, unit: str = "questions", done: int = 0) -> None:
        """The run has so many questions, or other units, of which some were done before."""

    def step(self, what: str) -> None:
        """What runs next."""

    def advance(self, done: int) -> None:
        """So many more questions are done."""

    def note(self, text: str) -> None:
        """Something that a reader of the figures must know."""

    def end(self) -> None:
        """The run is over, or broken off."""


#: For whoever is told nothing.
SILENT = Progress()


class Bar(Progress):
    """On standard error, with the time left: one line that changes in a terminal, else a line for every step."""

    def __init__(self) -> None:
        """Nothing is shown before ``begin``."""
        self._what, self._unit, self._began = "", "questions", 0.0
        self._total = self._done = self._before = 0
        self._line: _Line | None = None

    def begin(self, total: int, unit: str = "questions", done: int = 0) -> None:
        """The run has so many questions, or other units, of which some were done before."""
        self._total, self._unit = total, unit
        self._done = self._before = done
        self._began = time.monotonic()
        if sys.stderr.isatty():
            self._line = _Line(self._drawn)

    def step(self, what: str) -> None:
        """What runs next."""
        self._what = what
        if self._line is None:
            self.note(f"{what} ({self._done} of {self._total} {self._unit} done{self._left()})")

    def advance(self, done: int) -> None:
        """So many more questions are done."""
        self._done += done

    def reach(self, done: int, total: int, what: str, unit: str) -> None:
        """For runs that count themselves: so many units are done, of how many."""
        if not self._total:
            self.begin(total, unit, done)
            self.step(what)
        self.advance(done - self._done)

    def note(self, text: str) -> None:
        """A line of its own."""
        if self._line is not None:
            self._line.clear()
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Takes the line away."""
        if self._line is not None:
            self._line.end()
            self._line = None

    def _drawn(self) -> str:
        share = self._done / self._total if self._total else 0.0
        bar = "#" * round(20 * share)
        return f"{self._what} [{bar:<20}] {self._done}/{self._total} {self._unit}{self._left()}"

    def _left(self) -> str:
        fresh = self._done - self._before  # what an earlier run did tells nothing of the time
        if not fresh:
            return ""
        seconds = (time.monotonic() - self._began) / fresh * (self._total - self._done)
        return f", about {_duration(seconds)} left"


@contextlib.contextmanager
def status(what: str) -> Iterator[None]:
    """Says in a terminal what takes so long, and for how long it has, where nobody knows how long it will take.

    Args:
        what: runs while the context is open.
    """
    if not sys.stderr.isatty():
        yield
        return
    began = time.monotonic()
    line = _Line(lambda: f"{what} ({_duration(time.monotonic() - began)})")
    try:
        yield
    finally:
        line.end()


class _Line:
    """A line of a terminal that a thread draws until it ends; it first appears when patience is over."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text, self._over, self._lock, self._shown = text, threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        wait = PATIENCE_S
        while not self._over.wait(wait):
            with self._lock:
                print(f"\r\x1b[K{self._text()}", end="", file=sys.stderr, flush=True)
                self._shown = True
            wait = EVERY_S

    def clear(self) -> None:
        """Makes room for another line; this one comes back."""
        with self._lock:
            if self._shown:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
                self._shown = False

    def end(self) -> None:
        """Leaves nothing on the screen."""
        self._over.set()
        self._thread.join()
        self.clear()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
