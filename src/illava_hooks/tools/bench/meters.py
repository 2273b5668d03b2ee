"""Clocks and memory gauges of a device."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Memory", "Moment", "Stopwatch", "timed"]


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment on both clocks.

    Attributes:
        wall: of the device: an event that it may not have reached yet, or seconds of the wall clock.
        cpu: CPU seconds of all threads.
    """

    wall: Any
    cpu: float


class Stopwatch:
    """Time of a device: events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Starts."""
        self.device = device
        self._start = self.mark()

    def mark(self) -> Moment:
        """This moment; a device is not waited for, so that marks between its launches leave it as busy as it was."""
        if self.device.type != "cuda":
            return Moment(time.perf_counter(), time.process_time())
        with torch.cuda.device(self.device):
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        return Moment(event, time.process_time())

    def between(self, first: Moment, second: Moment) -> tuple[float, float]:
        """Seconds on the device's clock, once it has reached both moments; and CPU seconds of all threads."""
        if self.device.type != "cuda":
            return second.wall - first.wall, second.cpu - first.cpu
        second.wall.synchronize()
        return first.wall.elapsed_time(second.wall) / 1e3, second.cpu - first.cpu

    def look(self) -> tuple[float, float]:
        """Seconds since the start on the device's clock, once it has done all work so far; and CPU seconds."""
        return self.between(self._start, self.mark())


@contextlib.contextmanager
def timed(watch: Stopwatch, calls: Sequence[tuple[Any, str]], spent: list[tuple[float, float]]) -> Iterator[None]:
    """Notes the wall and CPU seconds of every outermost call of some functions; they are put back at the end.

    Args:
        watch: the clock.
        calls: owners (objects, classes or modules) and names.
        spent: receives one pair for every call.
    """
    depth = 0

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            began, depth = watch.look() if not depth else None, depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if began is not None:
                    wall, cpu = watch.look()
                    spent.append((wall - began[0], cpu - began[1]))

        return run

    own = [(owner, name, name in vars(owner), getattr(owner, name)) for owner, name in calls]
    try:
        for owner, name, _, function in own:
            setattr(owner, name, wrap(function))
        yield
    finally:
        for owner, name, was_there, function in own:
            if was_there:
                setattr(owner, name, function)
            else:
                delattr(owner, name)


class Memory:
    """Highest memory in use since the start, above what was in use then."""

    def __init__(self, device: torch.device) -> None:
        """Starts."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):  # only Linux has it
                Path("/proc/self/clear_refs").write_text("5")
            self._start = self._status("VmRSS")

    def peak(self) -> int:
        """The highest use of memory since the start, in bytes."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)) - self._start
        return max(0, self._status("VmHWM") - self._start)

    def _status(self, field: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
