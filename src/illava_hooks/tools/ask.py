"""Answers a question about pictures, with and without merging, and tells what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TextStreamer

from illava_hooks.api import merging, session_of
from illava_hooks.engine.report import MergeReport

__all__ = ["Answer", "answer", "is_small"]

#: Parameters of models whose times say something.
_LARGE = 100_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer.

    Attributes:
        text: without special tokens.
        merged: whether merging was on.
        prompt_tokens: of the prompt, visual ones included.
        new_tokens: generated, the end included.
        prefill_s: seconds until the first token: vision encoder, projector and prompt.
        decode_s: seconds for each further token; 0 where there is none, which is no time.
        report: tokens, FLOPs and KV bytes of both ways; None where nothing merged.
    """

    text: str
    merged: bool
    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    report: MergeReport | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        if self.new_tokens < 2:
            values["decode_s"] = None  # there was no further token to take the time of
        if self.report is not None:
            values["report"] |= {
                "summary": self.report.summary,
                "kept_fraction": self.report.kept_fraction,
                "flops": self.report.flops,
            }
        return values


class _Clock(TextStreamer):
    """Streams text to a function and notes when tokens come."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._show = show

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def is_small(model: Any) -> bool:
    """Whether a model is too small for its times to say anything: there every call costs more than the arithmetic."""
    return bool(sum(parameter.numel() for parameter in model.parameters()) < _LARGE)


def answer(
    model: Any,
    processor: Any,
    inputs: Any,
    merge: bool = True,
    max_new_tokens: int = 64,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Generates greedily.

    Args:
        model: a model, patched where ``merge`` is to have an effect.
        processor: its processor.
        inputs: one prompt as the processor prepares it.
        merge: whether merging is on.
        max_new_tokens: at most so many.
        show: gets the text piece by piece.
    """
    clock = _Clock(processor.tokenizer, show)
    session = session_of(model)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": clock}
    with torch.inference_mode():
        began = time.perf_counter()
        if session is None:
            ids = model.generate(**inputs, **settings)
        else:
            with merging(model, merge):
                ids = model.generate(**inputs, **settings)
    prompt_tokens = inputs["input_ids"].shape[1]
    new = ids[0, prompt_tokens:]
    first, last = clock.times[1], clock.times[-1]  # the prompt is put first
    return Answer(
        text=processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        merged=session is not None and merge,
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        prefill_s=first - began,
        decode_s=(last - first) / (len(new) - 1) if len(new) > 1 else 0.0,
        report=(session.report or None) if session is not None and merge else None,
    )
