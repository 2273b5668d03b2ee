"""Prompts of the examples, as the stock processors prepare them."""

from __future__ import annotations

from typing import Any

import torch

Picture = Any  # a PIL image, or the frames of a video as an array


def chat(
    processor: Any, turns: list[tuple[list[Picture], str]], answers: tuple[str, ...] = (), video: bool = False
) -> Any:
    """A conversation: pictures and a question for each turn of the user, and the answers so far."""
    kind = "video" if video else "image"
    messages: list[dict[str, Any]] = []
    for index, (pictures, question) in enumerate(turns):
        content = [*[{"type": kind}] * len(pictures), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if index < len(answers):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[index]}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = [picture for pictures, _ in turns for picture in pictures]
    if not given:
        return processor(text=[text], return_tensors="pt")
    return processor(text=[text], return_tensors="pt", **({"videos": given} if video else {"images": [given]}))


@torch.inference_mode()
def answer(model: Any, processor: Any, inputs: Any, **settings: Any) -> list[str]:
    """Greedy answers, one a row."""
    ids = model.generate(**inputs, **settings)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
