"""Answers of a model to items with known answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from illava_hooks.tools.datasets import Item

__all__ = ["accuracy", "predict"]


def predict(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy one-word answers, in the order of the items.

    Args:
        model: any supported model, patched or not.
        processor: its processor.
        items: what to ask.
        batch_size: prompts in one batch; batches hold prompts of equal pictures' sizes.
        advance: told how many more items are done.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.video, *(picture.shape for picture in item.pictures)), []).append(index)
    answers = [""] * len(items)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            inputs = item_inputs(processor, [items[index] for index in chosen]).to(model.device)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            texts = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text.strip()
            advance(len(chosen))
    return answers


def item_inputs(processor: Any, items: Sequence[Item]) -> Any:
    """A left-padded batch of prompts with pictures of the same kind."""
    kind = "video" if items[0].video else "image"
    texts = []
    for item in items:
        visuals = [{"type": kind} for _ in item.pictures]
        message = {"role": "user", "content": [*visuals, {"type": "text", "text": item.question}]}
        texts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    pictures: list[Any] = [list(item.pictures) for item in items]
    given = {"videos": [row[0] for row in pictures]} if kind == "video" else {"images": pictures}
    return processor(text=texts, return_tensors="pt", padding=True, **given)


def accuracy(items: Sequence[Item], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Right answers and questions, by kind and over all."""
    table: dict[str, tuple[int, int]] = {}
    for item, given in zip(items, answers, strict=True):
        for kind in (item.kind, "all"):
            right, total = table.get(kind, (0, 0))
            table[kind] = (right + (given == item.answer), total + 1)
    return table
