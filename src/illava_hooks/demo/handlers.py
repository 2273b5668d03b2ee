"""What happens on a click: each handler takes what gradio gives, and returns what it puts into the outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from illava_hooks.demo.chat import Chat, Turn, messages
from illava_hooks.demo.engine import Engine, Progress, Request
from illava_hooks.demo.extra import gradio
from illava_hooks.demo.forms import SIDES, check_turns, describe, latest, media_of, settings_of, turn_of
from illava_hooks.demo.view import caption, compared, costs, headline, hint, note, step_names
from illava_hooks.errors import IllavaHooksError
from illava_hooks.tools.loading import EMBEDDED, default_question

__all__ = ["PLAY", "STEP_S", "Handlers"]

THUMB = 256  # pixels of a preview's longer side

#: What the button says, and seconds that a position stands.
PLAY, PAUSE, STEP_S = "▶ Play", "❚❚ Pause", 1.5
SINGLE = "This toy model was trained on single questions: the turns before can mislead it. New chat asks without them."


class Handlers:
    """The handlers of one page; what a visitor did lives in the page's state, not here."""

    def __init__(self, engine: Engine) -> None:
        """For one engine."""
        self.engine, self.gr = engine, gradio()

    def ask(
        self,
        chat: Chat | None,
        files: list[str] | None,
        question: str,
        sides: str,
        method: str,
        preset: str,
        *numbers: str | float,
        again: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        """Answers the next question of a chat, or its last one again, streamed; faults are told on the page."""
        gr = self.gr
        before = chat if chat is not None and chat.files == tuple(files or ()) else Chat(tuple(files or ()))
        old = before.turns[-1:] if again else ()
        before = replace(before, turns=before.turns[: len(before.turns) - len(old)])
        try:
            media = media_of(files, self.engine.frames)
            default = default_question(self.engine.name, media)
            turn = replace(old[0], texts={}) if old else turn_of(question, default, first=not before.turns)
            settings = settings_of(method, preset, numbers)
            check_turns(before.turns)
            yield self._outputs(Progress(), before, turn, gr.skip() if old else gr.update(value=""))
            request = Request(media, turn.question, SIDES[sides], settings, before.turns)
            for progress in self.engine.run(request):
                if before.turns and self.engine.name in EMBEDDED:
                    progress = replace(progress, notes=(*progress.notes, SINGLE))
                turn = replace(turn, texts=progress.texts)
                yield self._outputs(progress, before, turn, gr.skip())
        except IllavaHooksError as error:
            yield self._failed(f"{error}.", chat, question)
        except Exception as error:
            logging.getLogger("illava_hooks").exception("a request failed")
            yield self._failed(
                f"This did not work ({type(error).__name__}); the server's log tells more.", chat, question
            )

    def again(self, *given: Any) -> Iterator[tuple[Any, ...]]:
        """The last question once more, with the settings that stand now; its answers are replaced."""
        yield from self.ask(*given, again=True)

    def _outputs(self, progress: Progress, before: Chat, turn: Turn, question: Any) -> tuple[Any, ...]:
        """What stands in every output of ``ask``."""
        gr, maps = self.gr, list(progress.maps)
        now = replace(before, turns=(*before.turns, turn))
        names = step_names(maps)
        return (
            note(progress.notes),
            messages(now.turns),
            now if progress.finished else before,
            question,
            headline(progress.answers),
            costs(progress.answers, self.engine.model, progress.runs),
            maps or None,
            gr.update(visible=bool(maps)),
            gr.update(choices=names, value=names[-1]) if maps else gr.skip(),
            caption(maps, len(names) - 1),
            compared(maps, len(names) - 1, True),
            gr.update(value=True) if maps else gr.skip(),
            *self._paused(),
        )

    def _failed(self, told: str, chat: Chat | None, question: str) -> tuple[Any, ...]:
        """The reason, and the chat and the question as they were before: what was not answered was not said."""
        gr, turns = self.gr, chat.turns if chat is not None else ()
        group = gr.update(visible=False)
        return (note((told,), failed=True), messages(turns), chat, question, "", "", None, group) + (
            gr.skip(), "", None, gr.skip(), *self._paused(),
        )  # fmt: skip

    def fresh(self, names: tuple[str, ...] = ()) -> tuple[Any, ...]:
        """A new chat about what lies there, of which the names are told, with nothing left of the last one."""
        talk = self.gr.update(value=[], placeholder=hint(names))
        return "", talk, None, "", "", None, self.gr.update(visible=False), *self._paused()

    def read(self, files: list[str] | None, before: int) -> tuple[Any, ...]:
        """What lies there after an upload, its number, small copies of what was read, and what is to be said of it.

        Args:
            files: all that was uploaded.
            before: how many of them had been read before.
        """
        gr, given = self.gr, list(files or ())
        left = latest(given, before, self.engine.frames)
        shown, told, names = self._small(left)
        talk = gr.update(placeholder=hint(names, left != given))
        return gr.skip() if left == given else left, len(left), shown, told or gr.skip(), names, talk

    def example(self, files: list[str], question: str) -> tuple[Any, ...]:
        """A new chat about bundled files, and a question about them."""
        shown, _, names = self._small(files)
        return files, len(files), shown, names, question, *self.fresh(names)

    def draw(self, maps: Any, step: str, colours: bool) -> tuple[Any, ...]:
        """The picture of one position."""
        found = maps or []
        place = self._place(found, step)
        return caption(found, place), compared(found, place, bool(colours))

    def play(self, maps: Any, step: str, colours: bool, label: str) -> tuple[Any, ...]:
        """Starts, from the input when the end was reached, or stops."""
        if label == PAUSE or not maps:
            return self.gr.skip(), self.gr.skip(), self.gr.skip(), *self._paused()
        names = step_names(maps)
        first = 0 if step == names[-1] else self._place(maps, step)
        return names[first], *self.draw(maps, names[first], colours), self.gr.update(value=PAUSE), self._timer(True)

    def advance(self, maps: Any, step: str, colours: bool) -> tuple[Any, ...]:
        """The next position; at the last one it stops."""
        if not maps:
            return self.gr.skip(), self.gr.skip(), self.gr.skip(), *self._paused()
        names = step_names(maps)
        following = min(self._place(maps, step) + 1, len(names) - 1)
        ends = following == len(names) - 1
        buttons = self._paused() if ends else (self.gr.skip(), self.gr.skip())
        return names[following], *self.draw(maps, names[following], colours), *buttons

    @staticmethod
    def _place(maps: Any, step: str) -> int:
        names = step_names(maps)
        return names.index(step) if step in names else len(names) - 1

    def _paused(self) -> tuple[Any, Any]:
        return self.gr.update(value=PLAY), self._timer(False)

    def _timer(self, active: bool) -> Any:
        return self.gr.Timer(STEP_S, active=active)

    def _small(self, files: list[str]) -> tuple[Any, str, tuple[str, ...]]:
        """Small copies of what was read, or why it cannot be read; and its names."""
        nothing = self.gr.update(value=None, visible=False)
        if not files:
            return nothing, "", ()
        try:
            media = media_of(files, self.engine.frames)
        except IllavaHooksError as error:
            return nothing, note((f"{error}.",), failed=True), ()
        small = [image.copy() for image in media.images]
        for image in small:
            image.thumbnail((THUMB, THUMB))
        return self.gr.update(value=small, visible=True), "", media.names

    def describe(self, method: str, preset: str, *numbers: str | float) -> str:
        """What the settings do, as HTML."""
        words, good = describe(self.engine.model, method, preset, numbers)
        return note((words,), failed=not good)
