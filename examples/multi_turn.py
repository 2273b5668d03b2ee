"""A conversation that keeps its cache, and brings a second picture: `python examples/multi_turn.py`.

Each turn encodes and merges only the pictures that it brings.
"""

from __future__ import annotations

from inspect import signature

import torch
from PIL import Image
from transformers import DynamicCache

from illava_hooks import patch, tiny
from prompts import chat

model, processor = tiny.load("llava_onevision")
session = patch(model)
# transformers 5.24 renamed the argument.
CACHE = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
cache = DynamicCache(config=model.config.get_text_config())

turns = [
    (
        [Image.open(tiny.media("pair/first.png")), Image.open(tiny.media("pair/second.png"))],
        "Which image has a red circle?",
    ),
    ([], "How many circles are in the second image?"),
]
answers: tuple[str, ...] = ()
for number in range(len(turns)):
    inputs = chat(processor, turns[: number + 1], answers)
    if number:  # the pictures are in the cache
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        ids = model.generate(**inputs, **{CACHE: cache})
    said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    answers += (said,)
    widths = [layer.keys.shape[2] for layer in cache.layers]
    print(f"{turns[number][1]} {said}")
    print(f"cache: {cache.get_seq_length()} positions, {widths} keys in the layers")
