"""The page itself: what stands where, and which handler runs on which click."""

from __future__ import annotations

from functools import partial
from typing import Any

from illava_hooks import tiny
from illava_hooks.demo.engine import Engine
from illava_hooks.demo.extra import gradio
from illava_hooks.demo.forms import FIELDS, KEEP, MAX_QUESTION, SIDES, limits_of
from illava_hooks.demo.handlers import PLAY, STEP_S, Handlers
from illava_hooks.demo.view import HINT
from illava_hooks.engine.finding import find_family
from illava_hooks.methods import METHODS
from illava_hooks.tools.info import model_info
from illava_hooks.tools.loading import EMBEDDED

__all__ = ["EXAMPLES", "METHOD", "Page"]

#: Bundled scenes, one click away: files, and a question that the embedded models know.
EXAMPLES = {
    "Scene": (("scene.png",), "how many triangles are there ?"),
    "Digits": (("digits.png",), "is there a green digit ?"),
    "Two images": (("pair/first.png", "pair/second.png"), "which image has a red circle ?"),
    "Clip": (("clip.gif",), "which way does the circle move ?"),
}
#: What merges at first: the method that the docs recommend where both stages merge.
METHOD = "novel-agnostic"
TOY = (
    "**This is a toy model** of 1.6 million parameters: it knows drawn shapes and digits, and its times say little. "
    "For photos of your own: `illava-hooks demo --model {}`"
)
SHOW_CHAT = "() => document.getElementById('chat').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
SHOW_LATEST = "() => setTimeout(() => document.querySelector('#chat .bubble-wrap')?.scrollTo(0, 1e6), 100)"
#: A number that is typed beside a slider stays as it was typed: gradio would take the nearest that is allowed.
AS_TYPED = """() => document.addEventListener('blur', event => {
    if (event.target.matches?.('#keep input[type=number]:out-of-range')) event.stopPropagation();
}, true)"""
KEEP_S = 3600  # what a visitor left behind is forgotten after so many seconds
CHAT_PX = 150  # an empty chat, and one with answers is as high as they are, up to thrice that


class Page:
    """The page of one engine."""

    def __init__(self, engine: Engine) -> None:
        """For one engine."""
        self.engine, self.gr, self.handlers = engine, gradio(), Handlers(engine)

    def build(self) -> Any:
        """The page, not yet served."""
        gr, handlers = self.gr, self.handlers
        with gr.Blocks(title="illava_hooks", analytics_enabled=False, delete_cache=(KEEP_S // 12, KEEP_S)) as blocks:
            gr.Markdown(self._title(), elem_id="title")
            maps, chat, number, names = (gr.State(value, time_to_live=KEEP_S) for value in (None, None, 0, ()))
            with gr.Row(equal_height=False, elem_id="sides-of-the-page"):
                with gr.Column(scale=4, min_width=320):
                    files, examples, preview = self._pictures()
                    with gr.Column(elem_id="knobs"):
                        knobs = self._knobs()
                    table = gr.HTML(elem_id="costs", padding=False)
                with gr.Column(scale=6, min_width=320):
                    talk, question, ask, again, fresh = self._talk()
                    notes = gr.HTML(elem_id="notes", padding=False)
                    head = gr.HTML(elem_id="headline", padding=False)
                    group, step, play, colours, text, shown = self._map()
            timer = gr.Timer(STEP_S, active=False)
            blocks.load(None, js=AS_TYPED)
            for button in (ask, again, *examples):  # on a phone the chat is below
                button.click(None, js=SHOW_CHAT, api_visibility="private")
            talk.change(None, js=SHOW_LATEST, api_visibility="private")
            given = [chat, files, question, *knobs]
            pictures = [step, text, shown]
            outputs = [notes, talk, chat, question, head, table, maps, group, *pictures, colours, play, timer]
            one = {"inputs": given, "outputs": outputs, "concurrency_limit": 1, "concurrency_id": "model"}
            one |= {"show_progress_on": [talk]}
            free = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
            running = [
                gr.on([ask.click, question.submit], handlers.ask, **one, api_name="ask"),
                again.click(handlers.again, **one, api_visibility="private"),
            ]
            clean, lying = [notes, talk, chat, head, table, maps, group, play, timer], [files, number, preview]
            for button, (stems, known) in zip(examples, EXAMPLES.values(), strict=True):
                paths, text_of = [str(tiny.media(name)) for name in stems], self._question(known)
                begin = partial(handlers.example, paths, text_of)
                clicked = button.click(begin, None, [*lying, names, question, *clean], **free)
                running.append(clicked.then(handlers.ask, **one, api_visibility="private"))
            # What is still streamed into a chat ends first, then the chat; what was uploaded is read behind that:
            # it can take longer than the next question.
            uploads = [files.upload, files.delete, files.clear]
            gr.on([fresh.click, *uploads], None, cancels=running, api_visibility="private")
            fresh.click(handlers.fresh, names, clean, **free)
            ended = gr.on(uploads, handlers.fresh, None, clean, **free)
            ended.then(handlers.read, lying[:2], [*lying, notes, names, talk], **free)
            position = [maps, step, colours]
            latest = free | {"trigger_mode": "always_last"}
            gr.on([step.input, colours.input], handlers.draw, position, pictures[1:], **latest)
            play.click(handlers.play, [*position, play], [*pictures, play, timer], **free)
            timer.tick(handlers.advance, position, [*pictures, play, timer], **free)
        return blocks

    def _pictures(self) -> tuple[Any, list[Any], Any]:
        """What the chat is about: files, examples, and small copies of what was read."""
        gr = self.gr
        kinds = ["image", "video", ".avif", ".mkv", ".mjpeg"]
        label = "Images (uploads add up), or one video"
        files = gr.File(label=label, file_count="multiple", file_types=kinds, height=150, elem_id="files")
        self._read_no_addresses(files)
        with gr.Row(elem_id="examples"):
            icons = [str(tiny.media(names[0])) for names, _ in EXAMPLES.values()]
            examples = [gr.Button(n, icon=i, size="sm") for n, i in zip(EXAMPLES, icons, strict=True)]
        preview = gr.Gallery(
            visible=False, show_label=False, columns=4, object_fit="contain", interactive=False,
            allow_preview=False, fit_columns=False, buttons=[], elem_id="preview", format="png",
        )  # fmt: skip
        return files, examples, preview

    def _talk(self) -> tuple[Any, ...]:
        """The chat, and what is said next."""
        gr = self.gr
        talk = gr.Chatbot(
            show_label=False, container=False, height="auto", min_height=CHAT_PX, max_height=3 * CHAT_PX, buttons=[],
            placeholder=HINT, elem_id="chat", group_consecutive_messages=False, feedback_options=None,
        )  # fmt: skip
        words = "such as: what color is the star ? is there a red circle ?"
        question = gr.Textbox(
            show_label=False, label="Question", max_length=MAX_QUESTION, elem_id="question",
            placeholder=f"Ask, {words}" if self.engine.name in EMBEDDED else "Ask about what is shown",
        )  # fmt: skip
        with gr.Row(elem_id="buttons"):
            ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
            again = gr.Button("Ask again", elem_id="again", min_width=80)
            fresh = gr.Button("New chat", elem_id="fresh", min_width=80)
        return talk, question, ask, again, fresh

    def _map(self) -> tuple[Any, ...]:
        """What is left behind each merging layer, over the input."""
        gr = self.gr
        with gr.Column(visible=False, elem_id="map") as group:
            with gr.Row(elem_id="positions"):
                play = gr.Button(PLAY, size="sm", elem_id="play", min_width=90, scale=0)
                step = gr.Radio(["Input"], value="Input", show_label=False, container=False, elem_id="step")
            text = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="map-caption", max_lines=2)
            shown = gr.ImageSlider(
                format="png", show_label=False, interactive=False, elem_id="map-picture",
                buttons=["fullscreen"], max_height=720, type="pil",
            )  # fmt: skip
            colours = gr.Checkbox(True, label="Colour what was merged into what", elem_id="colours")
        return group, step, play, colours, text, shown

    def _knobs(self) -> list[Any]:
        """How it is answered: the sides and the arguments of ``patch``."""
        gr, model = self.gr, self.engine.model
        sides = gr.Radio(list(SIDES), value="Side by side", label="Merging", elem_id="sides")
        limits = limits_of(model)
        keep = gr.Slider(0, 1, 0, step=0.05, label=KEEP, info=limits["keep"], elem_id="keep", buttons=[])
        keep.preprocess = lambda typed: typed  # whatever was typed is told below, where the other numbers are
        with gr.Accordion("Settings of merging", open=False, elem_id="settings"):
            with gr.Row():
                method = gr.Dropdown(list(METHODS), value=METHOD, label="method", min_width=120, elem_id="method")
                preset = gr.Dropdown(
                    ["auto", "image", "video"], value="auto", label="preset", min_width=120, elem_id="preset"
                )
            numbers = []
            for pair in (FIELDS[:2], FIELDS[2:4]):
                with gr.Row():
                    looks = {"placeholder": "by the preset", "max_length": 200, "min_width": 150}
                    numbers += [gr.Textbox(label=name, info=limits[name], elem_id=name, **looks) for name in pair]
            says = gr.HTML(self.handlers.describe(METHOD, "auto", *[""] * len(FIELDS)), elem_id="says")
        given = [method, preset, *numbers, keep]
        gr.on(
            [field.change for field in given], self.handlers.describe, given, says,
            concurrency_limit=None, show_progress="hidden", api_visibility="private", trigger_mode="always_last",
        )  # fmt: skip
        return [sides, *given]

    def _read_no_addresses(self, files: Any) -> None:
        """Where a request names an address instead of an uploaded file, gradio would download it."""
        stock = files.async_move_resource_to_block_cache

        async def moved(path: Any) -> Any:
            if "://" in str(path):
                raise self.gr.Error("only uploaded files are read", print_exception=False)
            return await stock(path)

        files.async_move_resource_to_block_cache = moved

    def _question(self, known: str) -> str:
        """Of an example: other models than the embedded ones get their default question."""
        return known if self.engine.name in EMBEDDED else ""

    def _title(self) -> str:
        facts = model_info(self.engine.model)
        layers = f"{facts['encoder_layers']} encoder and {facts['decoder_layers']} decoder layers"
        place = f"{facts['dtype']} on {facts['device']}"
        told = f"# Fewer visual tokens\n`{self.engine.name}`: {facts['class']}, {layers}, {place}"
        if self.engine.name not in EMBEDDED:
            return told
        real = next(iter(find_family(self.engine.model).shapes.values())).source
        return f"{told}\n\n{TOY.format(real)}"
