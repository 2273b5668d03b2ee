"""The page itself: what stands where, and which handler runs on which click."""

from __future__ import annotations

from typing import Any

from illava_hooks import tiny
from illava_hooks.demo.engine import Engine
from illava_hooks.demo.forms import FIELDS, MAX_QUESTION, SIDES, limits_of
from illava_hooks.demo.handlers import Handlers, gradio
from illava_hooks.demo.view import HINT
from illava_hooks.engine.finding import find_family
from illava_hooks.methods import METHODS
from illava_hooks.tools.info import model_info
from illava_hooks.tools.loading import EMBEDDED

__all__ = ["EXAMPLES", "Page"]

#: Bundled scenes, one click away: files, and a question that the embedded models know.
EXAMPLES = {
    "Scene": (("scene.png",), "how many triangles are there ?"),
    "Digits": (("digits.png",), "is there a green digit ?"),
    "Two images": (("pair/first.png", "pair/second.png"), "which image has a red circle ?"),
    "Clip": (("clip.gif",), "which way does the circle move ?"),
}
TOY = (
    "**This is a toy model** of 1.6 million parameters: it knows drawn shapes and digits, and its times say little. "
    "For photos of your own: `illava-hooks demo --model {}`"
)
SHOW_ANSWERS = "() => document.getElementById('plain').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
KEEP_S = 3600  # what a visitor left behind is forgotten after so many seconds


class Page:
    """The page of one engine."""

    def __init__(self, engine: Engine) -> None:
        """For one engine."""
        self.engine, self.gr, self.handlers = engine, gradio(), Handlers(engine)

    def build(self) -> Any:
        """The page, not yet served."""
        gr = self.gr
        with gr.Blocks(title="illava_hooks", analytics_enabled=False, delete_cache=(KEEP_S // 12, KEEP_S)) as blocks:
            gr.Markdown(self._title(), elem_id="title")
            maps = gr.State(None, time_to_live=KEEP_S)
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=320):
                    form, ask, examples, files, preview = self._form()
                with gr.Column(scale=6, min_width=320):
                    notes = gr.HTML(elem_id="notes")
                    head = gr.HTML(HINT, elem_id="headline")
                    with gr.Row():
                        plain = gr.Textbox(label="Without merging", lines=2, interactive=False, elem_id="plain")
                        merged = gr.Textbox(label="With merging", lines=2, interactive=False, elem_id="merged")
                    table = gr.HTML(elem_id="costs")
                    with gr.Column(visible=False, elem_id="map") as group:
                        step = gr.Slider(
                            0, 1, 0, step=1, label="Merging layer", info="0 is the input.", elem_id="step", buttons=[]
                        )
                        colours = gr.Checkbox(True, label="Colour what was merged into what", elem_id="colours")
                        text = gr.Textbox(show_label=False, interactive=False, elem_id="map-caption", max_lines=2)
                        shown = gr.ImageSlider(
                            format="png", show_label=False, interactive=False, elem_id="map-picture",
                            buttons=["fullscreen"], max_height=720, type="pil",
                        )  # fmt: skip
            for button in (ask, *examples):  # on a phone the answers are below
                button.click(None, js=SHOW_ANSWERS, api_visibility="private")
            outputs = [notes, plain, merged, table, maps, group, step, text, shown, colours, head]
            one = {
                "fn": self.handlers.ask,
                "inputs": form,
                "outputs": outputs,
                "concurrency_limit": 1,
                "concurrency_id": "model",
            }
            free = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
            gr.on([ask.click, form[1].submit], **one, api_name="ask", show_progress_on=[plain, merged])
            files.change(self.handlers.preview, files, [preview, notes], **free)
            for button, (names, question) in zip(examples, EXAMPLES.values(), strict=True):
                paths, text_of = [str(tiny.media(name)) for name in names], self._question(question)
                button.click(lambda p=paths, q=text_of: (p, q), None, form[:2], **free).then(
                    **one, api_visibility="private", show_progress_on=[plain, merged]
                )
            moved = {"fn": self.handlers.draw, "inputs": [maps, step, colours], "outputs": [text, shown]}
            gr.on([step.input, colours.input], **moved, **free, trigger_mode="always_last")
        return blocks

    def _form(self) -> tuple[list[Any], Any, list[Any], Any, Any]:
        """The left side."""
        gr, model, name = self.gr, self.engine.model, self.engine.name
        kinds = ["image", "video", ".avif", ".mkv", ".mjpeg"]
        label = "Images, or one video"
        files = gr.File(label=label, file_count="multiple", file_types=kinds, height=150, elem_id="files")
        self._read_no_addresses(files)
        with gr.Row(elem_id="examples"):
            icons = [str(tiny.media(names[0])) for names, _ in EXAMPLES.values()]
            examples = [gr.Button(n, icon=i, size="sm") for n, i in zip(EXAMPLES, icons, strict=True)]
        preview = gr.Gallery(
            visible=False, show_label=False, columns=4, object_fit="contain", interactive=False,
            allow_preview=False, fit_columns=False, buttons=[], elem_id="preview", format="png",
        )  # fmt: skip
        words = "such as: what color is the star ? is there a red circle ?" if name in EMBEDDED else None
        question = gr.Textbox(
            label="Question",
            info=words,
            placeholder="Ask about what is shown",
            max_length=MAX_QUESTION,
            elem_id="question",
        )
        sides = gr.Radio(list(SIDES), value="Side by side", label="Merging", elem_id="sides")
        limits = limits_of(model)
        keep = gr.Slider(
            0, 1, 0, step=0.05, label="Visual tokens kept", info=limits["keep"], elem_id="keep", buttons=[]
        )
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Accordion("Settings of merging", open=False, elem_id="settings"):
            with gr.Row():
                method = gr.Dropdown(list(METHODS), value="diverse", label="method", min_width=120, elem_id="method")
                preset = gr.Dropdown(
                    ["auto", "image", "video"], value="auto", label="preset", min_width=120, elem_id="preset"
                )
            numbers = []
            for pair in (FIELDS[:2], FIELDS[2:4]):
                with gr.Row():
                    looks = {"placeholder": "by the preset", "max_length": 200, "min_width": 150}
                    numbers += [gr.Textbox(label=name, info=limits[name], elem_id=name, **looks) for name in pair]
            says = gr.HTML(self.handlers.describe("diverse", "auto", *[""] * len(FIELDS)), elem_id="says")
        given = [method, preset, *numbers, keep]
        self.gr.on(
            [field.change for field in given], self.handlers.describe, given, says,
            concurrency_limit=None, show_progress="hidden", api_visibility="private", trigger_mode="always_last",
        )  # fmt: skip
        return [files, question, sides, *given], ask, examples, files, preview

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
