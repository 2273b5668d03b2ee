"""Answers in a given form: xgrammar's and outlines' logits processors around `generate` of a merging model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from client_helpers import CLOSE, QUESTION, client, embedded, forced_logits, picture, question
from helpers import assert_differ
from illava_hooks import merging, session_of
from tiny_models import FAMILIES

xgrammar = client("xgrammar")
xgrammar_hf = client("xgrammar.contrib.hf")
outlines, backends = client("outlines"), client("outlines.backends")

WORDS = ("red", "blue", "4")
QUESTIONS = (QUESTION, "what color is the circle ?")
STEPS = 2


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """Outlines compiles a kernel at its first step, for half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Seen(LogitsProcessor):
    """Keeps the logits of each step; xgrammar writes into them."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        return scores


def by_xgrammar(model: Any, processor: Any) -> Any:
    """A logits processor that allows the words and then the end."""
    words = model.config.text_config.vocab_size
    info = xgrammar.TokenizerInfo.from_huggingface(processor.tokenizer, vocab_size=words)
    grammar = xgrammar.GrammarCompiler(info).compile_grammar("root ::= " + " | ".join(f'"{word}"' for word in WORDS))
    return xgrammar_hf.LogitsProcessor(grammar)


def by_outlines(model: Any, processor: Any) -> Any:
    """The same with outlines."""
    wrapped = outlines.from_transformers(model, processor)
    return backends.get_regex_logits_processor(None, wrapped, "|".join(WORDS))


def answer(model: Any, processor: Any, make: Callable[[Any, Any], Any], inputs: Any) -> tuple[Tensor, Tensor]:
    """Words, and the logits in front of them before anything is forbidden."""
    seen = Seen()
    ids = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, logits_processor=[seen, make(model, processor)]
    )
    return ids[:, -STEPS:], torch.stack(seen.logits, 1)


@pytest.mark.parametrize("make", [by_xgrammar, by_outlines])
@pytest.mark.parametrize("family", FAMILIES)
def test_words(family: str, make: Callable[[Any, Any], Any]) -> None:
    """The most likely of the allowed words, by the logits of the merging model; a batch answers as its rows."""
    model, processor = embedded(family)
    plain, _ = embedded(family)
    inputs = question(processor, *QUESTIONS)
    words, logits = answer(model, processor, make, inputs)
    assert session_of(model).report.kept_fraction < 0.5
    torch.testing.assert_close(logits, forced_logits(plain, inputs, words), **CLOSE)
    with merging(plain, False):
        assert_differ(logits, forced_logits(plain, inputs, words))
    allowed = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(WORDS)))
    assert torch.equal(words[:, 0], allowed[logits[:, 0, allowed].argmax(-1)])
    assert words[:, 1].tolist() == [processor.tokenizer.eos_token_id] * len(QUESTIONS)
    for row, text in enumerate(QUESTIONS):
        one, alone = answer(model, processor, make, question(processor, text))
        assert torch.equal(one[0], words[row])
        torch.testing.assert_close(alone[0], logits[row], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_outlines_itself(family: str) -> None:
    """Its multimodal model calls the processor and `generate`."""
    model, processor = embedded(family)
    wrapped = outlines.from_transformers(model, processor)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    image = picture()
    image.format = "PNG"
    found = wrapped([text, outlines.inputs.Image(image)], Literal["red", "blue", "4"], max_new_tokens=STEPS)
    words, _ = answer(model, processor, by_xgrammar, question(processor, QUESTION))
    assert found == processor.tokenizer.decode(words[0, 0])
    assert session_of(model).report.kept_fraction < 0.5
