"""One model for everybody who has the page open: requests take turns, answers stream."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from illava_hooks import tiny
from illava_hooks.api import patch, unpatch
from illava_hooks.demo.chat import Turn, history
from illava_hooks.errors import IllavaHooksError, InputError
from illava_hooks.tools.ask import Answer, answer
from illava_hooks.tools.draw import MergeMap, merge_maps
from illava_hooks.tools.loading import build_inputs, listed, unknown_words
from illava_hooks.tools.media import Media, load_media

__all__ = ["Engine", "Progress", "Request"]

#: Between two answers: sending and showing the first one must not slow down the second.
SETTLE_S = 0.2

#: Where answers are quick they are timed again, in turn: so often at most, for so many seconds, so many tokens each.
RUNS, AGAIN_S, AGAIN_TOKENS = 5, 2.0, 4


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    Attributes:
        media: what it is about.
        question: the question itself.
        sides: in this order, whether to merge: ``(False, True)`` compares.
        settings: arguments of ``patch``.
        turns: what was asked about the same media before. The whole chat is read again, so that the tokens that are
            left are those that matter for this question.
    """

    media: Media
    question: str
    sides: tuple[bool, ...] = (False, True)
    settings: dict[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request has come.

    Attributes:
        texts: what is answered so far, by side.
        answers: the sides that are complete.
        maps: what was merged; empty until all answers are there.
        notes: what is to be told about the answers.
        runs: of how many measurements, in turn, the times of ``answers`` are the medians.
        finished: whether nothing follows.
    """

    texts: dict[bool, str] = field(default_factory=dict)
    answers: dict[bool, Answer] = field(default_factory=dict)
    maps: tuple[MergeMap, ...] = ()
    notes: tuple[str, ...] = ()
    runs: int = 1
    finished: bool = False


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


class Engine:
    """A model, its processor and a lock.

    Settings, reports and provenance belong to the model, so a request keeps the lock from ``patch`` to the last map.
    Between requests the model is unpatched.

    Attributes:
        name: of the model, as it was asked for.
        model: a stock model.
        processor: its processor.
        max_new_tokens: length of an answer at most.
        frames: frames taken of a video.
    """

    def __init__(self, name: str, model: Any, processor: Any, max_new_tokens: int = 64, frames: int = 8) -> None:
        """Takes over a loaded model."""
        self.name, self.model, self.processor = name, model, processor
        self.max_new_tokens, self.frames = max_new_tokens, frames
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def warm_up(self) -> None:
        """Answers once in both ways: what a first forward sets up is nothing that merging saves."""
        media = load_media(tiny.media("scene.png"))
        inputs = build_inputs(self.processor, media, "?", self.model.device, self.model.dtype)
        with self._lock:
            try:
                patch(self.model)
                for merge in (False, True):
                    answer(self.model, self.processor, inputs, merge, max_new_tokens=2)
            finally:
                unpatch(self.model)

    def run(self, request: Request) -> Iterator[Progress]:
        """Answers; closing the iterator stops the generation at its next token.

        Raises:
            IllavaHooksError: the request cannot be answered.
        """
        news: queue.Queue[Progress | BaseException] = queue.Queue()
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(request, news.put, stop), daemon=True)
        thread.start()
        try:
            finished = False
            while not finished:
                latest = news.get()
                with suppress(queue.Empty):  # a slow reader gets the newest only
                    while isinstance(latest, Progress):
                        latest = news.get_nowait()
                if isinstance(latest, BaseException):
                    raise latest
                finished = latest.finished
                yield latest
        finally:
            stop.set()

    def close(self) -> None:
        """Stops what is running and waits for it a little."""
        self._closed.set()
        if self._lock.acquire(timeout=5):
            self._lock.release()

    def _work(self, request: Request, tell: Callable[[Progress | BaseException], None], stop: threading.Event) -> None:
        """Everything that touches the model, in one thread: ``merging`` switches for the thread that opens it."""
        with self._lock:
            try:
                for progress in self._answer(request, tell, stop):
                    tell(progress)
            except _StoppedError as error:
                tell(error)  # to nobody, or to a page whose server closes
            except torch.OutOfMemoryError:
                tell(InputError("the device has too little memory for this; give a smaller picture or fewer frames"))
            except Exception as error:
                tell(error)

    def _answer(self, request: Request, tell: Callable[[Progress], None], stop: threading.Event) -> Iterator[Progress]:
        """Each state of a request, but for streamed pieces, which are told at once."""

        def check() -> None:
            if stop.is_set() or self._closed.is_set():
                raise _StoppedError("the page is closing")

        check()
        media, settings = request.media, request.settings
        chats = {side: tuple(history(request.turns, side)) for side in request.sides}
        target = self.model.device, self.model.dtype
        # Sides that read the same chat, as of a first question, have its pictures prepared once.
        made = {
            turns: build_inputs(self.processor, media, request.question, *target, turns)
            for turns in dict.fromkeys(chats.values())
        }
        inputs = {side: made[turns] for side, turns in chats.items()}
        unknown = unknown_words(self.processor, request.question)
        notes = [f"This model does not know {listed(unknown)}."] if unknown else []
        now = Progress(notes=tuple(notes))
        try:
            session = patch(self.model, **settings)
            merges = not session.config.schedule(media.kind).is_identity
            if True in request.sides and not merges:
                notes.append("These settings remove nothing.")
            for merge in request.sides:
                pieces: list[str] = []

                def show(piece: str, before: Progress = now, merge: bool = merge, so_far: list[str] = pieces) -> None:
                    check()
                    so_far.append(piece)
                    tell(replace(before, texts=before.texts | {merge: "".join(so_far)}))

                if now.answers:
                    time.sleep(SETTLE_S)
                check()
                found = answer(self.model, self.processor, inputs[merge], merge and merges, self.max_new_tokens, show)
                texts, answers = now.texts | {merge: found.text}, now.answers | {merge: found}
                now = replace(now, texts=texts, answers=answers, notes=tuple(notes))
                yield now
            now = self._timed(now, inputs, merges, check)
        finally:
            unpatch(self.model)
        maps: list[MergeMap] = []
        if True in request.sides and merges:
            check()
            try:
                maps = merge_maps(self.model, self.processor, inputs[True], media.images, **settings)
            except IllavaHooksError as error:  # the answers are there: only the picture is not
                notes.append(f"There is no map: {error}.")
            except Exception as error:
                logging.getLogger("illava_hooks").exception("the merging could not be drawn")
                notes.append(f"There is no map ({type(error).__name__}); the server's log tells more.")
        yield replace(now, maps=tuple(maps), notes=tuple(notes), finished=True)

    def _timed(self, now: Progress, inputs: dict[bool, Any], merges: bool, check: Callable[[], None]) -> Progress:
        """The same answers with times that are medians, where that takes little time."""
        times = {side: [(one.prefill_s, one.decode_s)] for side, one in now.answers.items()}
        most = min(AGAIN_TOKENS, self.max_new_tokens)
        round_s = sum(one.prefill_s + (most - 1) * one.decode_s for one in now.answers.values())
        again = min(RUNS - 1, int(AGAIN_S / round_s))
        for _ in range(again):
            for side in times:
                one = answer(self.model, self.processor, inputs[side], side and merges, most, lambda _: check())
                times[side].append((one.prefill_s, one.decode_s))
        middle = {side: [median(column) for column in zip(*found, strict=True)] for side, found in times.items()}
        answers = {
            side: replace(one, prefill_s=middle[side][0], decode_s=middle[side][1])
            for side, one in now.answers.items()
        }
        return replace(now, answers=answers, runs=1 + again)
