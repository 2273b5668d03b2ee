"""How far a long run is, and how much time is left."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Bar", "Progress"]


class Progress:
    """Hears what a run does; this one says nothing."""

    def begin(self, total: int) -> None:
        """The run has so many questions."""

    def step(self, what: str) -> None:
        """What runs next."""

    def advance(self, done: int) -> None:
        """So many more questions are done."""

    def note(self, text: str) -> None:
        """Something that a reader of the figures must know."""

    def end(self) -> None:
        """The run is over, or broken off."""


class Bar(Progress):
    """On standard error: a bar in a terminal, else a line for every step; both with the time left."""

    def __init__(self) -> None:
        """Nothing is shown before ``begin``."""
        self._bar: Any = None
        self._total = self._done = 0
        self._began = 0.0

    def begin(self, total: int) -> None:
        """The run has so many questions."""
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]  # transformers brings it

        self._total, self._done, self._began = total, 0, time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=" questions", file=sys.stderr, leave=False, dynamic_ncols=True)

    def step(self, what: str) -> None:
        """What runs next."""
        if self._bar is not None:
            self._bar.set_description(what)
            return
        left = ""
        if self._done:
            seconds = (time.monotonic() - self._began) / self._done * (self._total - self._done)
            left = f", about {_duration(seconds)} left"
        self.note(f"{what} ({self._done} of {self._total} questions done{left})")

    def advance(self, done: int) -> None:
        """So many more questions are done."""
        self._done += done
        if self._bar is not None:
            self._bar.update(done)

    def note(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
