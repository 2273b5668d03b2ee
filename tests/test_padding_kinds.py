"""What is padding is read from the whole mask at every call, whatever its form: each row answers as it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

from decode_helpers import BOTH, IMAGE, IMAGES, TEXT, patched, single
from families import families, families_and, family_of
from helpers import assert_differ, key_lengths, keyed, needs_ready_features
from illava_hooks import merging, session_of
from kind_helpers import CACHE, CLOSE, PADDED, feed, prefill, prompt_positions
from tiny_models import FAMILIES, PAD_ID, Inputs, Sample, inputs_for

ROWS = [IMAGE, IMAGES]
#: Tokens of each row's first answer: the second row's is padded.
ANSWERS = (4, 2)
ROOM = 1200


def some_ids(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(20, 100, (rows, count), generator=torch.Generator().manual_seed(seed))


def empty(model: Any, kind: str) -> Any:
    config = model.config.text_config
    return StaticCache(config=config, max_cache_len=ROOM) if kind == "static" else DynamicCache(config=config)


def both_ways(model: Any, check: Any) -> None:
    """Runs a check unmerged first: the oracle itself, on stock."""
    with merging(model, False):
        check()
    check()


# ------------------------------------------------------------------------------ answers of unequal length


def types(inputs: Inputs, ids: Tensor) -> Inputs:
    """Token types of a longer sequence, where the family wants them."""
    known = inputs.get("mm_token_type_ids")
    return {} if known is None else {"mm_token_type_ids": pad(known, (0, ids.shape[1] - known.shape[1]))}


def two_turns(model: Any, samples: list[Sample], answers: tuple[int, ...], question: Tensor, cache: str) -> Any:
    """Logits of the second answers by `generate`, which goes on with the cache of the first."""
    inputs = inputs_for(model, samples)
    width, count = inputs["input_ids"].shape[1], max(answers)
    wanted = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    first = model.generate(**inputs, max_new_tokens=count, **{CACHE: empty(model, cache)}, **wanted)
    real = torch.arange(count) < torch.tensor(answers)[:, None]
    said = torch.where(real, first.sequences[:, width:], PAD_ID)
    ids = torch.cat([inputs["input_ids"], said, question], dim=1)
    mask = torch.cat([inputs["attention_mask"], real.long(), torch.ones_like(question)], dim=1)
    given = {"input_ids": ids, "attention_mask": mask, **types(inputs, ids)}
    return model.generate(**given, max_new_tokens=3, **{CACHE: first.past_key_values}, **wanted).logits


@pytest.mark.parametrize("answers", [(4, 2), (1, 3), (2, 4)])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", families(carries_state=False))
def test_pads_behind_the_shorter_answer_by_generate(family: str, cache: str, answers: tuple[int, int]) -> None:
    model = patched(family)
    question = some_ids(2, 5)

    def check() -> None:
        found = two_turns(model, ROWS, answers, question, cache)
        for row in range(2):
            expected = two_turns(model, ROWS[row : row + 1], answers[row : row + 1], question[row : row + 1], cache)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours[row], theirs[0], **PADDED)

    both_ways(model, check)


def by_forward(
    model: Any, samples: list[Sample], answers: tuple[int, ...], question: Tensor, cache: str, fed: str, dtype: Any
) -> Tensor:
    """Logits of a question behind answers that were fed with ones in the mask, and have zeros under them now."""
    inputs = inputs_for(model, samples)
    count = max(answers)
    held, start = prefill(model, inputs, empty(model, cache))
    ids = torch.stack([some_ids(1, count, 5)[0], some_ids(1, count, 6)[0]])[-len(samples) :]
    ids = ids if len(samples) > 1 else some_ids(1, count, 5 + ROWS.index(samples[0]))
    mask = inputs["attention_mask"]
    for piece in [slice(0, count)] if fed == "at once" else [slice(i, i + 1) for i in range(count)]:
        mask = torch.cat([mask, torch.ones_like(ids[:, piece])], dim=1)
        feed(model, held, ids[:, piece], start + piece.start, mask.to(dtype))
    real = torch.arange(count) < torch.tensor(answers)[:, None]
    mask = torch.cat([inputs["attention_mask"], real.long(), torch.ones_like(question)], dim=1)
    return feed(model, held, question, start + torch.tensor(answers), mask.to(dtype))


@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize("fed", ["at once", "token by token"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", families(carries_state=False))
def test_pads_behind_the_shorter_answer_by_forward(family: str, cache: str, fed: str, asked: int) -> None:
    """One token or several go on, with zeros in the mask under tokens that were real when they came."""
    model = patched(family)
    question = some_ids(2, asked)

    def check() -> None:
        found = by_forward(model, ROWS, ANSWERS, question, cache, fed, torch.long)
        for row in range(2):
            alone = ROWS[row : row + 1], ANSWERS[row : row + 1], question[row : row + 1]
            expected = by_forward(model, *alone, cache, fed, torch.long)
            torch.testing.assert_close(found[row], expected[0], **PADDED)

    both_ways(model, check)


@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.uint8])
@pytest.mark.parametrize("family", families(carries_state=False))
def test_masks_of_any_dtype(family: str, dtype: torch.dtype, asked: int) -> None:
    model = patched(family)
    question = some_ids(2, asked)

    def check() -> None:
        found = by_forward(model, ROWS, ANSWERS, question, "dynamic", "at once", dtype)
        alone = by_forward(model, ROWS[1:], ANSWERS[1:], question[1:], "dynamic", "at once", dtype)
        torch.testing.assert_close(found[1], alone[0], **PADDED)

    both_ways(model, check)


@pytest.mark.parametrize("family", families(carries_state=False))
def test_zeros_that_come_later_change_something(family: str) -> None:
    """The tests above could fail: a token under which a zero comes matters where it stays."""
    model = patched(family)
    inputs, question, ids = inputs_for(model, ROWS), some_ids(2, 1), torch.cat([some_ids(1, 4, 5), some_ids(1, 4, 6)])
    with merging(model, False):
        hidden = by_forward(model, ROWS, (4, 2), question, "dynamic", "at once", torch.long)
        held, start = prefill(model, inputs)
        feed(model, held, ids, start, pad(inputs["attention_mask"], (0, 4), value=1))
        start = start + torch.tensor([4, 2])
        seen = feed(model, held, question, start, pad(inputs["attention_mask"], (0, 5), value=1))
    assert_differ(hidden[1], seen[1])


# ---------------------------------------------------------------------------- zeros in the middle of the past


def without_keys(cache: Any, columns: list[slice]) -> None:
    """Takes keys out of a dynamic cache, by layer."""
    for layer, gone in zip(keyed(cache), columns, strict=True):
        left = torch.ones(layer.keys.shape[-2], dtype=torch.bool)
        left[gone] = False
        layer.keys, layer.values = layer.keys[:, :, left], layer.values[:, :, left]


#: Logical columns under which zeros come, given the first and the last visual column; negative: from the end.
GONE = {"in front of the image": (1, 3), "behind the image": (-5, -3), "the last but one": (-2, -1)}


@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize("place", [*GONE, "the image"])
@pytest.mark.parametrize("family", families(carries_state=False))
def test_zeros_in_the_middle_of_the_past(family: str, place: str, asked: int) -> None:
    """As if the keys under the zeros were not there."""
    model = patched(family)
    inputs, new = single(model, IMAGE), some_ids(1, asked)
    visual = (inputs["input_ids"][0] == 5).nonzero().flatten()
    width, first, last = inputs["input_ids"].shape[1], int(visual[0]), int(visual[-1])

    def check() -> None:
        cache, start = prefill(model, inputs)
        gone = slice(first, last + 1) if place == "the image" else slice(*GONE[place])
        mask = inputs["attention_mask"].clone()
        mask[:, gone] = 0
        found = feed(model, cache, new, start, pad(mask, (0, asked), value=1))
        cache, start = prefill(model, inputs)
        held = key_lengths(cache)
        if place == "the image":
            columns = [slice(first, last + 1 - (width - length)) for length in held]
        else:
            columns = [gone] * len(held)
        without_keys(cache, columns)
        expected = feed(model, cache, new, start)
        torch.testing.assert_close(found, expected, **CLOSE)

    both_ways(model, check)


@pytest.mark.parametrize("family", families(carries_state=False))
def test_a_zero_comes_and_goes(family: str) -> None:
    """Each call's own mask counts: a later one that sees the token again is as if no zero had been there."""
    model = patched(family)
    inputs, new = single(model, IMAGE), some_ids(1, 3)

    def check() -> None:
        mask = pad(inputs["attention_mask"], (0, 1), value=1)
        mask[:, -6:-3] = 0
        cache, start = prefill(model, inputs)
        hidden = feed(model, cache, new[:, :1], start, mask)
        cache.crop(-1)
        found = feed(model, cache, new, start, pad(inputs["attention_mask"], (0, 3), value=1))
        cache, start = prefill(model, inputs)
        expected = feed(model, cache, new, start)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert_differ(hidden[0, 0], expected[0, 0])

    both_ways(model, check)


# ------------------------------------------------------------------------------------ longer than needed

SAMPLES = {"one": [IMAGE], "padded": ROWS, "with video": [BOTH]}


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_a_mask_as_long_as_a_static_cache(family: str, kind: str, value: int) -> None:
    """Columns behind the tokens of a call say nothing about them, in a prefill and in each step behind it."""
    model, samples = patched(family), SAMPLES[kind]
    inputs, new = inputs_for(model, samples), some_ids(len(samples), 3)
    width, where = inputs["input_ids"].shape[1], prompt_positions(model, inputs)

    def run(longer: bool) -> list[Tensor]:
        mask = inputs["attention_mask"]

        def given(length: int) -> Tensor:
            whole = pad(mask, (0, length - width), value=1)
            return pad(whole, (0, ROOM - length), value=value) if longer else whole

        cache = empty(model, "static")
        with torch.no_grad():
            rest = {**inputs, "attention_mask": given(width)}
            logits = [model(**rest, position_ids=where, **{CACHE: cache}).logits]
        start = where.amax(-1).reshape(-1, len(samples)).amax(0) + 1
        logits.append(feed(model, cache, new[:, :2], start, given(width + 2)))
        return [*logits, feed(model, cache, new[:, 2:], start + 2, given(width + 3))]

    def check() -> None:
        real = inputs["attention_mask"].bool()
        for index, (ours, theirs) in enumerate(zip(run(True), run(False), strict=True)):
            torch.testing.assert_close(
                ours[real] if index == 0 else ours, theirs[real] if index == 0 else theirs, **CLOSE
            )

    if family_of(family).carries_state:  # stock looks at the last columns of a mask, whatever they stand for
        check()
    else:
        both_ways(model, check)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_mask_of_any_dtype(family: str, dtype: torch.dtype) -> None:
    model = patched(family)
    inputs = inputs_for(model, ROWS)
    where, real = prompt_positions(model, inputs), inputs["attention_mask"].bool()

    def check() -> None:
        with torch.no_grad():
            given = {"position_ids": where, CACHE: empty(model, "static")}
            expected = model(**inputs, **given).logits
            longer = pad(inputs["attention_mask"], (0, ROOM - len(real[0]))).to(dtype)
            given = {"position_ids": where, CACHE: empty(model, "static")}
            found = model(**{**inputs, "attention_mask": longer}, **given).logits
        torch.testing.assert_close(found[real], expected[real], **CLOSE)

    if family_of(family).carries_state:  # stock looks at the last columns of a mask, whatever they stand for
        check()
    else:
        both_ways(model, check)


# ------------------------------------------------------------------------- images behind text that was padded


@needs_ready_features
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", families(carries_state=False))
def test_an_image_behind_answers_of_unequal_length(family: str, cache: str) -> None:
    """A first turn without images, whose answers get zeros under them when the images come, and later."""
    model = patched(family)
    texts, images = [TEXT, Sample(text_seed=22, text=(6,))], [IMAGE, IMAGES]
    answers, count = (3, 1), 3
    said, new = some_ids(2, count, 8), some_ids(2, 2, 9)

    def run(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        first = inputs_for(model, [texts[row] for row in rows])
        second = inputs_for(model, [images[row] for row in rows])
        lengths = torch.tensor([answers[row] for row in rows])
        held, start = prefill(model, first, empty(model, cache))
        mask = pad(first["attention_mask"], (0, count), value=1)
        feed(model, held, said[rows], start, mask)
        mask[:, -count:] = torch.arange(count) < lengths[:, None]
        mask = torch.cat([mask, second["attention_mask"]], dim=1)
        where = prompt_positions(model, second) + (start + lengths)[:, None]
        rest = {**second, "attention_mask": mask}
        with torch.no_grad():
            logits = model(**rest, position_ids=where, **{CACHE: held}).logits
        behind = where.amax(-1).reshape(-1, len(rows)).amax(0) + 1
        step = feed(model, held, new[rows, :1], behind, pad(mask, (0, 1), value=1))
        return logits[:, -6:], step, feed(model, held, new[rows, 1:], behind + 1, pad(mask, (0, 2), value=1))

    def check() -> None:
        together = run([0, 1])
        for row in range(2):
            for ours, theirs in zip(together, run([row]), strict=True):
                torch.testing.assert_close(ours[row], theirs[0], **PADDED)

    both_ways(model, check)
    assert session_of(model).report.kept_fraction < 0.5
