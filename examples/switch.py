"""Switch merging off for a block, and take the patch back: `python examples/switch.py`."""

from __future__ import annotations

import torch
from PIL import Image

from illava_hooks import merging, patch, session_of, tiny, unpatch
from prompts import answer, chat

for family in ("llava_onevision", "qwen2_vl"):
    model, processor = tiny.load(family)
    inputs = chat(processor, [([Image.open(tiny.media("scene.png"))], "What color is the star?")])
    with torch.inference_mode():
        stock = model(**inputs).logits

        session = patch(model)
        merged = model(**inputs).logits
        print(f"{family}: with merging {answer(model, processor, inputs)}")
        print(session.report)
        with merging(model, False):  # this thread or task only
            print(f"off, logits equal to the stock model's: {torch.equal(model(**inputs).logits, stock)}")
        print(f"on again, logits equal to the first ones: {torch.equal(model(**inputs).logits, merged)}")

        unpatch(model)
        print(f"taken back, logits equal: {torch.equal(model(**inputs).logits, stock)}; {session_of(model)}")
