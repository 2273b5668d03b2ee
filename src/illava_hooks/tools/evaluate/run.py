"""Answers of a model to items, and what it kept of their visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illava_hooks.api import session_of
from illava_hooks.engine.report import MergeReport
from illava_hooks.errors import InputError
from illava_hooks.tools.evaluate.matching import MATCHES, is_right
from illava_hooks.tools.evaluate.sharing import distinct, repeated
from illava_hooks.tools.items import Item
from illava_hooks.tools.loading import check_question

__all__ = ["Outcome", "Prompts", "accuracy", "answering", "check_questions", "item_inputs", "predict", "run_items"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A model's answers to some items.

    Attributes:
        answers: what it said, one a item.
        log_probs: ``(n, V)`` float32, of its first word.
        left: visual tokens behind the last merging layer, of all items together.
        whole: how many there are without merging; 0 where nobody can tell.
        flops: of the prefills of all items, merged and unmerged, each with the encoder's for its own pictures; 0 of
            an unpatched model.
    """

    answers: list[str]
    log_probs: NDArray[np.float32]
    left: int = 0
    whole: int = 0
    flops: tuple[int, int] = (0, 0)

    def divergence(self, other: Outcome) -> NDArray[np.float64]:
        """``KL(self || other)`` of the first word, in nats, ``(n,)``."""
        mine, its = self.log_probs.astype(np.float64), other.log_probs.astype(np.float64)
        found: NDArray[np.float64] = (np.exp(mine) * (mine - its)).sum(1)
        return found


class Prompts:
    """Batches as the processor makes them, kept for further runs over the same items.

    Every method is asked the same questions, and preparing their pictures anew takes up to a fifth of a small model's
    time.
    """

    def __init__(self, processor: Any, most: int = 2**30) -> None:
        """Nothing is kept yet.

        Args:
            processor: the model's.
            most: bytes that are kept; what comes later is prepared each time.
        """
        self.processor, self.most = processor, most
        # The items themselves are kept too, so that their ids stay theirs.
        self._kept: dict[tuple[int, ...], tuple[list[Item], Any]] = {}

    def batch(self, items: Sequence[Item]) -> Any:
        """``item_inputs``, made now or before."""
        key = tuple(map(id, items))
        if key not in self._kept:
            inputs = item_inputs(self.processor, items)
            size = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
            if size > self.most:
                return inputs
            self.most -= size
            self._kept[key] = list(items), inputs
        return self._kept[key][1].copy()  # moving a batch to a device replaces what it holds


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """The model without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def run_items(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    batch_size: int = 32,
    max_new_tokens: int = 4,
    advance: Callable[[int], None] = lambda done: None,
    prompts: Prompts | None = None,
) -> Outcome:
    """Greedy answers, in the order of the items; a picture that prompts of a batch share is encoded once.

    Args:
        model: any supported model, patched or not.
        processor: its processor.
        items: what to ask.
        batch_size: prompts in one batch; batches hold prompts of equal pictures' sizes.
        max_new_tokens: length of an answer at most.
        advance: told how many more items are done.
        prompts: keeps what the processor makes of the items, for the next run over them.
    """
    prompts = prompts or Prompts(processor, 0)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.video, *(picture.shape for picture in item.pictures)), []).append(index)
    answers = [""] * len(items)
    log_probs: list[Any] = [None] * len(items)
    left = whole = 0
    flops = (0, 0)
    session = session_of(model)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            batch = [items[index] for index in chosen]
            inputs = prompts.batch(batch).to(model.device, model.dtype)
            settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
            with torch.inference_mode():
                given, places = _encoded_once(model, prompts, batch, inputs)
                done = model.generate(**given, **settings, return_dict_in_generate=True, output_logits=True)
            new = done.sequences[:, inputs["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
            first = done.logits[0].float().log_softmax(-1).cpu().numpy()
            for index, text, row in zip(chosen, texts, first, strict=True):
                answers[index], log_probs[index] = text.strip(), row
            counts = (
                _in_prompt(model, inputs["input_ids"])
                if session is None
                else _kept(session.report, places, len(batch[0].pictures))
            )
            left, whole = left + counts[0], whole + counts[1]
            if session is not None:
                now = _flops(session.report, places)
                flops = flops[0] + now[0], flops[1] + now[1]
            advance(len(chosen))
    return Outcome(answers, np.stack(log_probs), left, whole, flops)


def _flops(report: MergeReport, places: Sequence[int] | None) -> tuple[int, int]:
    """Prefill FLOPs of a batch, merged and unmerged.

    Pictures of a batch are equally large, so where fewer were encoded than are shown each counts as often.

    Args:
        report: of the last run.
        places: whose pictures each prompt shows, if pictures were encoded once; else None.
    """
    shown, encoded = (1, 1) if places is None else (len(places), max(places) + 1)
    encoder = zip(report.encoder_flops, report.projector_flops, strict=True)
    merged, whole = (sum(stages) * shown // encoded for stages in encoder)
    return merged + report.llm_flops[0], whole + report.llm_flops[1]


def _encoded_once(model: Any, prompts: Prompts, batch: Sequence[Item], inputs: Any) -> tuple[Any, list[int] | None]:
    """Arguments of ``generate``, and whose pictures each prompt shows where fewer were encoded than are shown."""
    first, places = distinct(batch)
    if len(first) < len(batch):
        few = prompts.batch([batch[index] for index in first]).to(model.device, model.dtype)
        if (given := repeated(model, inputs, few, places, batch[0])) is not None:
            return given, places
    return inputs, None


def _kept(report: MergeReport, places: Sequence[int] | None, each: int) -> tuple[int, int]:
    """Visual tokens of a batch behind the last merging layer, and without merging.

    Where the language model is left alone they are the encoder's, whose report knows each picture once.

    Args:
        report: of the last run.
        places: whose pictures each prompt shows, if pictures were encoded once; else None.
        each: pictures of a prompt.
    """
    left, whole, visuals = 0, 0, report.visuals
    if places is not None and len(visuals) < len(places) * each:
        visuals = tuple(visuals[place * each + number] for place in places for number in range(each))
    for visual in visuals:
        merged = visual.left, visual.prompt_tokens
        counts = merged if visual.language_tokens else (visual.vision_tokens[-1], visual.vision_tokens[0])
        left, whole = left + counts[0], whole + counts[1]
    return left, whole


def _in_prompt(model: Any, ids: Tensor) -> tuple[int, int]:
    """Placeholders of visual tokens in a batch, which an unpatched model all keeps."""
    names = ("image_token_id", "video_token_id")
    placeholders = [token for name in names if isinstance(token := getattr(model.config, name, None), int)]
    count = int(torch.isin(ids, torch.tensor(placeholders, device=ids.device, dtype=ids.dtype)).sum())
    return count, count


def predict(model: Any, processor: Any, items: Sequence[Item], batch_size: int = 32, **settings: Any) -> list[str]:
    """The answers of ``run_items`` alone."""
    return run_items(model, processor, items, batch_size, **settings).answers


def check_questions(processor: Any, items: Sequence[Item]) -> None:
    """Refuses, before a long run begins, what ``item_inputs`` would refuse in the midst of it.

    Raises:
        InputError: a question holds a placeholder of the model, or letters that are no Unicode.
    """
    for number, item in enumerate(items, 1):
        try:
            check_question(processor, item.question)
        except InputError as error:
            raise InputError(f"item {number}: {error}") from error


def item_inputs(processor: Any, items: Sequence[Item]) -> Any:
    """A left-padded batch of prompts with pictures of the same kind."""
    kind = "video" if items[0].video else "image"
    texts = []
    for item in items:
        check_question(processor, item.question)
        visuals = [{"type": kind} for _ in item.pictures]
        message = {"role": "user", "content": [*visuals, {"type": "text", "text": item.question}]}
        texts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    pictures: list[Any] = [list(item.pictures) for item in items]
    given = {"videos": [row[0] for row in pictures]} if kind == "video" else {"images": pictures}
    return processor(text=texts, return_tensors="pt", padding=True, padding_side="left", **given)


def accuracy(items: Sequence[Item], answers: Sequence[str], match: str = "exact") -> dict[str, tuple[int, int]]:
    """Right answers and questions whose answer is known, by kind and over all.

    Args:
        items: what was asked.
        answers: what was said.
        match: a key of ``MATCHES``.
    """
    table: dict[str, tuple[int, int]] = {}
    for item, given in zip(items, answers, strict=True):
        hit = is_right(given, item.accepted, MATCHES[match])
        if hit is None:
            continue
        for kind in (item.kind, "all"):
            right, total = table.get(kind, (0, 0))
            table[kind] = (right + hit, total + 1)
    return table
