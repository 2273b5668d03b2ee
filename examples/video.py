"""A question about a video: `python examples/video.py`."""

from __future__ import annotations

from illava_hooks import merging, patch, tiny
from illava_hooks.tools.media import load_media
from prompts import answer, chat

media = load_media(tiny.media("clip.gif"), num_frames=8)
for family in ("llava_onevision", "qwen2_vl"):
    model, processor = tiny.load(family)
    inputs = chat(processor, [([media.frames], "Which way does the circle move?")], video=True)
    session = patch(model)  # the preset for videos, since the prompt has one
    print(f"{family}, {len(media.frames)} frames: {answer(model, processor, inputs)[0]}")
    print(session.report)
    with merging(model, False):
        print(f"without merging: {answer(model, processor, inputs)[0]}")
