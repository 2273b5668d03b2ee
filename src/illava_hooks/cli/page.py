"""The command ``demo``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from illava_hooks.cli.options import AsJson, Debug, Device, Dtype, Frames, MaxNewTokens, Model, friendly

__all__ = ["demo"]


@friendly
def demo(
    model: Model = "tiny",
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine sees it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page.")] = False,
    max_file_size: Annotated[int, typer.Option(min=1, help="Largest file that can be uploaded, in MB.")] = 100,
    max_new_tokens: MaxNewTokens = 64,
    frames: Frames = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve a page that compares answers with and without merging, and shows what is merged."""
    from illava_hooks.demo.extra import check_gradio

    check_gradio()  # where it is missing, the error comes before torch is loaded, let alone a large model

    from illava_hooks.demo.engine import Engine
    from illava_hooks.demo.serve import serve
    from illava_hooks.tools.loading import load_model, quiet
    from illava_hooks.tools.progress import status

    quiet()
    with status(f"loading {model}"):
        engine = Engine(model, *load_model(model, device, dtype), max_new_tokens, frames)
        engine.warm_up()
    say = (lambda line: print(json.dumps(line), flush=True)) if as_json else lambda line: print(line, flush=True)
    serve(engine, host, port, max_file_size, browser, say)
