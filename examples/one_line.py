"""One line patches a model: `python examples/one_line.py`."""

from __future__ import annotations

from PIL import Image

from illava_hooks import patch, tiny

model, processor = tiny.load("llava_onevision")  # or from_pretrained(...) of transformers
scene = Image.open(tiny.media("scene.png"))

patch(model)

message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many stars are there?"}]}
text = processor.apply_chat_template([message], add_generation_prompt=True)
inputs = processor(text=text, images=scene, return_tensors="pt")
ids = model.generate(**inputs)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
