"""What people ask `generate` for beside greedy search: processors, criteria, guidance, attentions, their own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from decode_helpers import IMAGE, IMAGES, RAGGED, next_positions, patched, single
from families import families, family_of
from helpers import assert_differ, key_lengths
from illava_hooks import merging, session_of
from illava_hooks.engine.compat import CACHE
from tiny_models import FAMILIES, Inputs, inputs_for, tiny_model

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
NEW = 5


def generated(model: Any, inputs: Inputs, new_tokens: int = NEW, **kwargs: Any) -> Any:
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    return model.generate(**inputs, max_new_tokens=new_tokens, **wanted, **kwargs)


@torch.no_grad()
def replayed(model: Any, inputs: Inputs, new: Tensor) -> list[Tensor]:
    """The logits before each of the tokens ``(1, T)``, by a loop of our own over ``forward``."""
    positions = next_positions(model, inputs, new.shape[1])
    out = model(**inputs)
    logits = [out.logits[:, -1]]
    for step in range(new.shape[1] - 1):
        where = {name: p[..., step : step + 1] for name, p in positions.items()}
        out = model(input_ids=new[:, step : step + 1], **{CACHE: out.past_key_values}, **where)
        logits.append(out.logits[:, -1])
    return logits


def assert_merged_and_replayed(model: Any, inputs: Inputs, done: Any) -> None:
    """The raw logits are those of the loop over ``forward``, and keys are fewer than tokens."""
    width, steps = inputs["input_ids"].shape[1], len(done.logits)
    lengths = key_lengths(done.past_key_values)
    assert max(lengths) < width and lengths[-1] < lengths[0]
    assert session_of(model).report.kept_fraction < 0.5
    expected = replayed(model, inputs, done.sequences[:, -steps:])
    torch.testing.assert_close(torch.stack(list(done.logits)), torch.stack(expected), **CLOSE)


# --------------------------------------------------------------------------- processors and criteria


class OnlyOdd(LogitsProcessor):
    """Forbids even ids."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)


class AfterTwo(StoppingCriteria):
    """Stops after two new tokens."""

    def __init__(self, prompt_length: int) -> None:
        self.end = prompt_length + 2

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.end)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_of_ones_own(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGES)
    done = generated(model, inputs, logits_processor=[OnlyOdd()])
    assert_merged_and_replayed(model, inputs, done)
    assert (done.sequences[:, -NEW:] % 2 == 1).all()
    for scores, logits in zip(done.scores, done.logits, strict=True):
        assert torch.equal(scores[:, 1::2], logits[:, 1::2]) and scores[:, ::2].isneginf().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_criterion_of_ones_own(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGES)
    width = inputs["input_ids"].shape[1]
    done = generated(model, inputs, stopping_criteria=[AfterTwo(width)])
    assert done.sequences.shape == (1, width + 2)
    assert_merged_and_replayed(model, inputs, done)
    assert torch.equal(done.sequences, generated(model, inputs).sequences[:, : width + 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_min_new_tokens(family: str) -> None:
    """The end token would come first."""
    model = patched(family)
    inputs = single(model, IMAGES)
    width = inputs["input_ids"].shape[1]
    end = int(generated(model, inputs).sequences[0, width])
    assert generated(model, inputs, eos_token_id=end).sequences.shape[1] == width + 1
    done = generated(model, inputs, eos_token_id=end, min_new_tokens=3)
    assert done.sequences.shape[1] > width + 2 and end not in done.sequences[0, width : width + 3]
    assert_merged_and_replayed(model, inputs, done)


@pytest.mark.parametrize("family", FAMILIES)
def test_repetition_penalty(family: str) -> None:
    """It looks at the ids of the whole prompt, merged or not."""
    model = patched(family)
    inputs = single(model, IMAGES)
    done = generated(model, inputs, repetition_penalty=1.7)
    assert_merged_and_replayed(model, inputs, done)
    width = inputs["input_ids"].shape[1]
    for step, (scores, logits) in enumerate(zip(done.scores, done.logits, strict=True)):
        seen = torch.zeros(logits.shape[-1], dtype=torch.bool)
        seen[done.sequences[0, : width + step]] = True
        expected = torch.where(seen, torch.where(logits > 0, logits / 1.7, logits * 1.7), logits)
        torch.testing.assert_close(scores, expected, **CLOSE)
        assert_differ(scores, logits)


# ------------------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("family", families(takes_guidance=True))
def test_guidance_mixes_in_what_text_alone_says(family: str, scale: float) -> None:
    """Not all stock models can (see below). The other branch is the stock model on the last token."""
    model, stock = patched(family), tiny_model(family)
    inputs = single(model, IMAGES)
    done = generated(model, inputs, guidance_scale=scale)
    assert_merged_and_replayed(model, inputs, done)
    text = torch.cat([inputs["input_ids"][:, -1:], done.sequences[:, -NEW:-1]], dim=1)
    with torch.no_grad():
        alone = stock(input_ids=text).logits[0].log_softmax(-1)
    for step, (scores, logits) in enumerate(zip(done.scores, done.logits, strict=True)):
        expected = scale * (logits.log_softmax(-1) - alone[step]) + alone[step]
        torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize("family", families(takes_guidance=False))
def test_stock_takes_no_guidance(family: str) -> None:
    """The day that this fails, the test above is for the family as well."""
    model = tiny_model(family)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|Sizes of tensors must match"):
        generated(model, single(model, IMAGE), guidance_scale=2.0)


# ------------------------------------------------------------------------- attentions, loops of one's own


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_those_of_the_kept_keys(family: str) -> None:
    """Rows over the physical keys: at the prompt as `forward` gives them, then one row per new token."""
    model = patched(family, attn_implementation="eager")
    inputs = single(model, IMAGES)
    done = generated(model, inputs, output_attentions=True)
    assert_merged_and_replayed(model, inputs, done)
    with torch.no_grad():
        prompt = model(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(list(done.attentions[0]), list(prompt), **CLOSE)
    tokens = session_of(model).report.sequence_tokens
    lengths = [tokens[layer][0] for layer in family_of(model).attending(model)]
    assert len(done.attentions) == NEW
    for step, attentions in enumerate(done.attentions):
        for length, weights in zip(lengths, attentions, strict=True):
            assert weights.shape == (1, 4, 1 if step else length, length + step)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), **CLOSE)


def own_loop(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
    """A greedy loop as `custom_generate` takes one."""
    prompt_length = input_ids.shape[1]
    while input_ids.shape[1] < prompt_length + generation_config.max_new_tokens:
        state = {
            name: value for name, value in kwargs.items() if name not in ("logits_processor", "stopping_criteria")
        }
        first = input_ids.shape[1] == prompt_length
        given = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=first, **({} if first else {"next_sequence_length": 1}), **state
        )
        out = model(**given, return_dict=True)
        input_ids = torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], dim=1)
        kwargs = model._update_model_kwargs_for_generation(out, kwargs)
    own_loop.cache = kwargs[CACHE]  # type: ignore[attr-defined]  # the way out for what the test looks at
    return input_ids


@pytest.mark.parametrize("samples", [[IMAGE], RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_of_ones_own(family: str, samples: list[Any]) -> None:
    model = patched(family)
    inputs = inputs_for(model, samples)
    expected = generated(model, inputs)
    ids = model.generate(**inputs, max_new_tokens=NEW, custom_generate=own_loop)
    assert torch.equal(ids, expected.sequences)
    assert key_lengths(own_loop.cache) == key_lengths(expected.past_key_values)  # type: ignore[attr-defined]
    with merging(model, False):
        assert_differ(generated(model, inputs).logits[0], expected.logits[0])
