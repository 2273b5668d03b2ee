"""Which patches does a survivor stand for: `python examples/provenance.py`."""

from __future__ import annotations

from PIL import Image

from illava_hooks import patch, tiny
from prompts import answer, chat

for family in ("llava_onevision", "qwen2_vl"):
    model, processor = tiny.load(family)
    session = patch(model, method="nearest", track=True)
    inputs = chat(processor, [([Image.open(tiny.media("scene.png"))], "How many stars are there?")])
    answer(model, processor, inputs)
    for stage, layer in session.provenance.merges:
        image = session.provenance.at(stage, layer).images[0]
        tokens, patches = image.weights.shape
        shares = image.weights.to_dense()
        largest = int((shares > 0).sum(1).argmax())
        print(f"{family}, {stage} layer {layer}: {tokens} tokens stand for {patches} patches; one of them,", end=" ")
        print(f"at position {int(image.seats[largest])}, for {int((shares[largest] > 0).sum())} patches")
