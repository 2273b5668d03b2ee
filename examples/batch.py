"""Rows with different pictures in one batch answer as they do alone: `python examples/batch.py`."""

from __future__ import annotations

from PIL import Image

from illava_hooks import patch, tiny
from prompts import answer, chat

scene, digits, pair = (Image.open(tiny.media(name)) for name in ("scene.png", "digits.png", "pair/first.png"))
rows = [
    ([scene], "How many stars are there?"),
    ([digits], "Which digit is purple?"),
    ([pair, Image.open(tiny.media("pair/second.png"))], "How many circles are in the second image?"),
    ([], "What color is the star?"),
]

for family in ("llava_onevision", "qwen2_vl"):
    model, processor = tiny.load(family)
    patch(model)
    alone = [answer(model, processor, chat(processor, [row]))[0] for row in rows]

    texts = []
    for pictures, question in rows:
        content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    images = [pictures for pictures, _ in rows if pictures]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    together = answer(model, processor, batch)
    for (pictures, question), one, other in zip(rows, alone, together, strict=True):
        print(f"{family}, {len(pictures)} images: {question} {other} (alone: {one})")
    print(f"the same in a batch as alone: {together == alone}")
