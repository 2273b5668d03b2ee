"""Write a method of your own: `python examples/custom_method.py`.

A method is a score for the vision encoder, a score for the language model, a rule that merges, and a layout.
Each is a name from the library or a function of yours. Here the encoder keeps every second token, like the
black fields of a chess board, and merges each white field into the black one most similar to it.
"""

from __future__ import annotations

import torch
from PIL import Image

from illava_hooks import Method, ScoreInputs, patch, tiny
from prompts import answer, chat

SIDE = 8  # tokens in a row of a tile


def black_fields(inputs: ScoreInputs) -> torch.Tensor:
    """Score 1 on black fields, 0 on white ones: higher means keep."""
    row, column = inputs.positions // SIDE, inputs.positions % SIDE
    return ((row + column) % 2 == 0).float()


CHECKERBOARD = Method("checkerboard", black_fields, llm_score="last_query_attention", merge="nearest")

model, processor = tiny.load("llava_onevision")
inputs = chat(processor, [([Image.open(tiny.media("scene.png"))], "How many stars are there?")])
session = patch(model, [3], SIDE * SIDE // 2, llm_layers=[2], llm_ratio=0.5, method=CHECKERBOARD)
print(f"method: {session.config.method.name}, answer: {answer(model, processor, inputs)[0]}")
print(session.report)
