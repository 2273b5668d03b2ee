"""What `generate` can be given and asked for while merging: ready features, beams, padding, a cache, an assistant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from decode_helpers import (
    BOTH,
    IMAGE,
    IMAGES,
    KINDS,
    RAGGED,
    TEXT,
    VIDEO,
    next_positions,
    patched,
    single,
    skip_where_stock_mixes_images,
)
from families import families, families_and, family_of
from helpers import assert_differ, before, feature_outputs, key_lengths, needs_ready_features
from illava_hooks import merging
from illava_hooks.engine.compat import CACHE
from tiny_models import FIRST_TEXT_ID, VOCAB_SIZE, Inputs, inputs_for, tiny_model

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
#: Another padding is another width of the same products.
PADDED: dict[str, Any] = {"atol": 2e-4, "rtol": 0.0}
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}
BATCHES = {
    "ragged": RAGGED,
    "with video": [VIDEO, TEXT, BOTH],
    "images": [IMAGES, IMAGE],
    "with text": [BOTH, TEXT],
}
NEW = 4


def generated(model: Any, inputs: Inputs, new_tokens: int = NEW, **kwargs: Any) -> Any:
    """A generation without sampling, with everything that it can tell."""
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **wanted, **kwargs)


def assert_same_answers(ours: Any, theirs: Any, **tolerance: Any) -> None:
    """The logits of every step, the ids, and where there are beams their scores."""
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), **tolerance)
    steps = len(theirs.logits)
    assert torch.equal(ours.sequences[:, -steps:], theirs.sequences[:, -steps:])
    if "sequences_scores" in theirs:
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, **tolerance)


# ------------------------------------------------------------------------ features and embeddings


@needs_ready_features
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_ready_features_give_what_pixels_give(family: str, kind: str, way: str) -> None:
    if way == "beams":
        skip_where_stock_mixes_images(family, KINDS[kind])
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    expected = generated(model, inputs, **WAYS[way])
    rest = family_of(family).beside_features(inputs)
    with torch.no_grad():
        ready = feature_outputs(model, inputs, return_dict=True)  # fresh: beams write to them
    assert_same_answers(generated(model, rest, mm_encoder_outputs=ready, **WAYS[way]), expected, **CLOSE)
    with merging(model, False):
        assert_differ(generated(model, inputs, **WAYS[way]).logits[0], expected.logits[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "kind"), families_and(KINDS, generates_from_embeddings=True))
def test_embeddings_give_what_ids_give(family: str, kind: str, way: str) -> None:
    """Other families need ids to place their tokens, patched or not (see below)."""
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    found, expected = (generated(model, given, **WAYS[way]) for given in ({**rest, "inputs_embeds": embeds}, inputs))
    assert_same_answers(found, expected, **CLOSE)


@pytest.mark.parametrize("family", families(generates_from_embeddings=False))
def test_stock_places_embeddings_otherwise(family: str) -> None:
    """The day that this fails, the test above is for the family as well."""
    model = tiny_model(family)
    inputs = single(model, IMAGE)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert_differ(generated(model, {**rest, "inputs_embeds": embeds}).logits[0], generated(model, inputs).logits[0])


# ------------------------------------------------------------------------------- beams and padding


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "kind"), families_and(["ragged", "with video"], BATCHES))
def test_all_beams_of_a_batch_are_those_of_its_rows(family: str, kind: str, back_end: str) -> None:
    batch = BATCHES[kind]
    skip_where_stock_mixes_images(family, batch)
    model = patched(family, attn_implementation=back_end)
    settings = {"num_beams": 3, "num_return_sequences": 3}
    whole = generated(model, inputs_for(model, batch, side="left"), **settings)
    assert len(whole.sequences) == 3 * len(batch)
    for row, sample in enumerate(batch):
        alone = generated(model, single(model, sample), **settings)
        mine = slice(3 * row, 3 * row + 3)
        assert torch.equal(whole.sequences[mine, -NEW:], alone.sequences[:, -NEW:])
        assert len(alone.sequences.unique(dim=0)) == 3
        torch.testing.assert_close(whole.sequences_scores[mine], alone.sequences_scores, **PADDED)
        for ours, expected in zip(whole.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[mine], expected, **PADDED)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [1, 3, 20])
@pytest.mark.parametrize(("family", "kind"), families_and(["images", "both", "ragged"], KINDS))
def test_padding_never_changes_an_answer(family: str, kind: str, padding: int, way: str) -> None:
    """Also where padding is not the pad token: the mask decides."""
    if way == "beams":
        skip_where_stock_mixes_images(family, KINDS[kind])
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    expected = generated(model, inputs, **WAYS[way])
    padded = dict(inputs)
    for name in family_of(family).token_inputs:
        padded[name] = torch.nn.functional.pad(padded[name], (padding, 0))
    noise = torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, padded["input_ids"].shape)
    padded["input_ids"] = torch.where(padded["attention_mask"].bool(), padded["input_ids"], noise)
    assert_same_answers(generated(model, padded, **WAYS[way]), expected, **PADDED)


# ------------------------------------------------------------------------------------ second turns


@pytest.mark.parametrize(("family", "kind"), families_and(["images", "with text"], BATCHES))
def test_a_second_turn_goes_on_with_the_cache(family: str, kind: str) -> None:
    """Two rows through `generate` twice, against each row alone through `forward`, token by token."""
    model, batch = patched(family), BATCHES[kind]
    inputs = inputs_for(model, batch)
    first = generated(model, inputs, use_cache=True)
    question = torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (2, 5))
    ids = torch.cat([first.sequences, question], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW + 5), value=1)
    second = generated(
        model, {"input_ids": ids, "attention_mask": mask}, new_tokens=3, **{CACHE: first.past_key_values}
    )
    new = torch.cat([first.sequences[:, -NEW:], question, second.sequences[:, -3:]], dim=1)
    width = inputs["input_ids"].shape[1]
    assert second.past_key_values.get_seq_length() == width + new.shape[1] - 1
    assert key_lengths(second.past_key_values)[-1] < width
    for row, sample in enumerate(batch):
        alone = single(model, sample)
        positions = next_positions(model, alone, new.shape[1])
        with torch.no_grad():
            out = model(**alone)
            logits = [out.logits[0, -1]]
            for step in range(new.shape[1] - 1):
                where = {name: p[..., step : step + 1] for name, p in positions.items()}
                token = new[row, step].view(1, 1)
                out = model(input_ids=token, **{CACHE: out.past_key_values}, **where)
                logits.append(out.logits[0, -1])
        steps = [*first.logits, *[None] * 5, *second.logits]
        for found, expected in zip(steps, logits, strict=True):
            if found is not None:
                torch.testing.assert_close(found[row], expected, **PADDED)


# --------------------------------------------------------------------------------------- assistants


class KnowsTheAnswer:
    """Hook of an assistant: it guesses the answer, but for every fifth token."""

    def __init__(self, prompt_length: int, answer: Tensor) -> None:
        self.prompt_length, self.answer = prompt_length, answer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        index = output.past_key_values.get_seq_length() - self.prompt_length
        guess = self.answer[min(index, len(self.answer) - 1)]
        output.logits[:, -1] = torch.nn.functional.one_hot(guess + (index % 5 == 2), VOCAB_SIZE).float()


class Widths:
    """Hook of a base model: how many tokens each call brings."""

    def __init__(self, model: Any) -> None:
        self.seen: list[int] = []
        model.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])


def tiny_text_model() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=VOCAB_SIZE, bos_token_id=None, eos_token_id=None)
    return Qwen2ForCausalLM(config).eval()


ASSISTANTS: dict[str, Callable[[str], Any]] = {
    "the stock model": tiny_model,
    "a stranger": lambda family: tiny_model(family, seed=4),
    "the patched model": patched,
    "a patched stranger": lambda family: patched(family, seed=4),
    "a text model": lambda family: tiny_text_model(),
    "one who knows": tiny_model,
}


@pytest.mark.parametrize("who", ASSISTANTS)
@pytest.mark.parametrize(("family", "kind"), families_and(["image", "both"], KINDS, carries_state=False))
def test_assisted_decoding_is_greedy_decoding(family: str, kind: str, who: str) -> None:
    """Candidates come in threes and are taken or cropped away; nothing merges for their sake."""
    if who == "a text model" and (more := family_of(family).token_inputs[2:]):
        pytest.skip(f"stock: a text model does not take the {', '.join(more)} that generate hands on")
    if who == "a text model" and before("5.18"):
        pytest.skip("stock: generate hands pixels on to the assistant")
    model, assistant = patched(family), ASSISTANTS[who](family)
    inputs = inputs_for(model, KINDS[kind])
    expected = generated(model, inputs, new_tokens=12)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.assistant_confidence_threshold = 0.0
    if who == "one who knows":
        length = inputs["input_ids"].shape[1]
        assistant.register_forward_hook(KnowsTheAnswer(length, expected.sequences[0, length:]))
    widths = Widths(model)
    found = generated(model, inputs, new_tokens=12, assistant_model=assistant)
    assert_same_answers(found, expected, **CLOSE)
    assert widths.seen[0] == inputs["input_ids"].shape[1] + 3 and max(widths.seen[1:]) == 4
    if who == "one who knows":
        assert 3 < len(widths.seen) < 9, "guesses were taken, and guesses were not"


# ------------------------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_hidden_states_have_the_stock_shapes(family: str, kind: str, way: str) -> None:
    if way == "beams":
        skip_where_stock_mixes_images(family, KINDS[kind])
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])

    def hidden_states() -> list[list[Tensor]]:
        done = generated(model, inputs, output_hidden_states=True, **WAYS[way])
        return [list(step) for step in done.hidden_states]

    found = hidden_states()
    with merging(model, False):
        stock = hidden_states()
    assert [[state.shape for state in step] for step in found] == [[s.shape for s in step] for step in stock]
    assert found[0][0].shape[1] == inputs["input_ids"].shape[1]
    assert_differ(found[0][4], stock[0][4])
    if way == "greedy" and len(KINDS[kind]) == 1:
        with torch.no_grad():
            prompt = model(**inputs, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found[0], list(prompt), **CLOSE)
