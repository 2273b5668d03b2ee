"""What happens on a click: each handler takes what gradio gives, and returns what it puts into the outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from illava_hooks.demo.engine import Engine, Progress, Request
from illava_hooks.demo.forms import SIDES, describe, media_of, question_of, settings_of
from illava_hooks.demo.view import caption, costs, note, picture, steps
from illava_hooks.errors import IllavaHooksError, InputError
from illava_hooks.tools.loading import default_question

__all__ = ["Handlers", "check_gradio", "gradio"]

CURE = "pip install '.[demo]' in a checkout, or pip install 'illava-hooks[demo]'"
THUMB = 256  # pixels of a preview's longer side


def check_gradio() -> None:
    """Looks for gradio without importing it, which makes a folder for its files.

    Raises:
        InputError: it is not installed, or another major version is.
    """
    try:
        found = version("gradio")
    except PackageNotFoundError:
        raise InputError(f"the demo page needs gradio, which is not installed; {CURE}") from None
    if not found.startswith("6."):
        raise InputError(f"the demo page needs gradio 6, and {found} is installed; {CURE}")


def gradio() -> Any:
    """The module.

    Raises:
        InputError: it cannot be imported.
    """
    check_gradio()
    try:
        return import_module("gradio")
    except ImportError as error:
        raise InputError(f"gradio cannot be imported ({error}); {CURE}") from error


class Handlers:
    """The handlers of one page; what a visitor did lives in the page's state, not here."""

    def __init__(self, engine: Engine) -> None:
        """For one engine."""
        self.engine, self.gr = engine, gradio()

    def ask(
        self, files: list[str] | None, question: str, sides: str, method: str, preset: str, *numbers: str
    ) -> Iterator[tuple[Any, ...]]:
        """Answers, streamed; what goes wrong is told on the page."""
        yield self._outputs(Progress(notes=("Answering …",)))
        try:
            media = media_of(files, self.engine.frames)
            text = question_of(question, default_question(self.engine.name, media))
            settings = settings_of(method, preset, numbers)
            for progress in self.engine.run(Request(media, text, SIDES[sides], settings)):
                yield self._outputs(progress)
        except IllavaHooksError as error:
            yield self._outputs(Progress(notes=(f"{error}.",)), failed=True)
        except Exception as error:
            logging.getLogger("illava_hooks").exception("a request failed")
            told = f"This did not work ({type(error).__name__}); the server's log tells more."
            yield self._outputs(Progress(notes=(told,)), failed=True)

    def _outputs(self, progress: Progress, failed: bool = False) -> tuple[Any, ...]:
        gr, maps = self.gr, list(progress.maps)
        last = len(steps(maps))
        slider = gr.update(maximum=last, value=last) if last else gr.skip()
        return (
            note(progress.notes, failed),
            progress.texts.get(False, ""),
            progress.texts.get(True, ""),
            costs(progress.answers, self.engine.model),
            maps or None,
            gr.update(visible=bool(maps)),
            slider,
            caption(maps, last),
            picture(maps, last),
        )

    def draw(self, maps: Any, step: int, colours: bool) -> tuple[Any, ...]:
        """The picture of one position of the slider."""
        found = maps or []
        step = max(0, min(int(step or 0), len(steps(found))))
        return caption(found, step), picture(found, step, bool(colours))

    def preview(self, files: list[str] | None) -> tuple[Any, ...]:
        """Small copies of what was read, or why it cannot be read."""
        if not files:
            return self.gr.update(value=None, visible=False), ""
        try:
            media = media_of(files, self.engine.frames)
        except IllavaHooksError as error:
            return self.gr.update(value=None, visible=False), note((f"{error}.",), failed=True)
        small = [image.copy() for image in media.images]
        for image in small:
            image.thumbnail((THUMB, THUMB))
        return self.gr.update(value=small, visible=True), ""

    def describe(self, method: str, preset: str, *numbers: str) -> str:
        """What the settings do, as HTML."""
        words, good = describe(self.engine.model, method, preset, numbers)
        return note((words,), failed=not good)
