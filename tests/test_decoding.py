"""Every way of decoding, on caches that hold fewer keys than the sequence has tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from decode_helpers import (
    IMAGE,
    IMAGES,
    KINDS,
    RAGGED,
    RICHEST,
    TEXT,
    next_positions,
    patched,
    single,
    skip_where_stock_mixes_images,
    steps,
)
from families import families, families_and, family_of
from helpers import before, key_lengths, needs_ready_features, needs_tracing
from illava_hooks import PatchStateError, merging, session_of
from illava_hooks.engine.compat import CACHE
from tiny_models import FAMILIES, Sample, inputs_for, tiny_model

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}


def text_turn(model: Any, cache: Any, ids: Tensor, positions: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **{CACHE: cache}, **positions).logits


@pytest.mark.parametrize(("family", "kind"), families_and(["image", "images", "video", "both"], KINDS))
def test_generate_is_step_by_step_forward(family: str, kind: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    ids, logits = steps(model, inputs)
    with torch.no_grad():
        out = model(**inputs)
        torch.testing.assert_close(out.logits[:, -1], logits[0], **CLOSE)
        positions = next_positions(model, inputs, 5)
        for step in range(4):
            where = {name: p[..., step : step + 1] for name, p in positions.items()}
            out = model(input_ids=ids[:, step : step + 1], **{CACHE: out.past_key_values}, **where)
            torch.testing.assert_close(out.logits[:, -1], logits[step + 1], **CLOSE)


@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_cache_lengths_are_the_plan(family: str, kind: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        report = session_of(model).report
        attending = family_of(family).attending(model)
        assert key_lengths(cache) == [max(report.sequence_tokens[layer]) for layer in attending]
        assert max(key_lengths(cache)) < inputs["input_ids"].shape[1]
        assert {cache.get_seq_length(layer) for layer in attending} == {inputs["input_ids"].shape[1]}
        with merging(model, False):
            assert model(**inputs).past_key_values.get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_of_text(family: str, static: bool) -> None:
    model = patched(family)
    inputs = single(model, IMAGES)
    ids = torch.randint(20, 100, (1, 6))
    positions = next_positions(model, inputs, 6)

    def first_turn() -> Any:
        cache = (
            StaticCache(config=model.config.text_config, max_cache_len=400)
            if static
            else family_of(model).new_cache(model)
        )
        with torch.no_grad():
            return model(**inputs, **{CACHE: cache}).past_key_values

    together = text_turn(model, first_turn(), ids, positions)
    cache = first_turn()
    one_by_one = [
        text_turn(model, cache, ids[:, i : i + 1], {name: p[..., i : i + 1] for name, p in positions.items()})
        for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(one_by_one, dim=1), **CLOSE)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 6


@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_with_a_new_image(family: str) -> None:
    """The new image merges by itself; what follows may be fed at once or token by token."""
    model, known = patched(family), family_of(family)
    first, second = single(model, IMAGE), single(model, RICHEST[family])
    visual = (second["input_ids"][0] < 10).nonzero().max() + 1  # the last placeholder or vision marker
    start = first["input_ids"].shape[1]

    def positions(count: slice) -> dict[str, Tensor]:
        starts = next_positions(model, first, 1)
        return {name: (start + known.positions(model, second))[..., count] for name, start in starts.items()}

    def run(pieces: list[slice]) -> tuple[Tensor, Any]:
        with torch.no_grad():
            cache = model(**first).past_key_values
            logits = []
            for index, piece in enumerate(pieces):
                names = ["input_ids"] if index else [n for n in known.token_inputs if n != "attention_mask"]
                per_token = {name: second[name][:, piece] for name in names}
                pixels = {n: v for n, v in second.items() if n not in known.token_inputs} if index == 0 else {}
                given = positions(piece)
                logits.append(model(**per_token, **pixels, **given, **{CACHE: cache}).logits)
            return torch.cat(logits, dim=1), cache

    length = second["input_ids"].shape[1]
    # The scoring query is the end of the piece with the images: it has to be the same token in both runs.
    _, cache = run([slice(0, visual + 1)])
    at_once, _ = run([slice(0, visual + 1), slice(visual + 1, length)])
    singly, last = run([slice(0, visual + 1), *(slice(i, i + 1) for i in range(visual + 1, length))])
    torch.testing.assert_close(at_once, singly, **CLOSE)
    assert last.get_seq_length() == start + length
    assert key_lengths(cache)[-1] < key_lengths(cache)[0] < start + visual + 1


@pytest.mark.parametrize("family", families(carries_state=False))
def test_padded_batch_takes_a_second_turn(family: str) -> None:
    model, known = patched(family), family_of(family)
    ids = torch.randint(20, 100, (2, 4))
    inputs = inputs_for(model, [IMAGES, TEXT])
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])], dim=1)
    where: dict[str, Tensor] = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -4:]}
    alone_where: list[dict[str, Tensor]] = [{}, {}]
    with torch.no_grad():
        counted = {} if known.keeps_positions else {"position_ids": known.positions(model, inputs)}
        cache = model(**inputs, **counted).past_key_values
        if known.keeps_positions:
            firsts = [
                next_positions(model, single(model, IMAGES), 4)["position_ids"],
                known.spread(torch.arange(10, 14)[None]),
            ]
            where = {"position_ids": torch.cat(firsts, dim=-2)}
            alone_where = [{"position_ids": firsts[0]}, known.explicit(torch.arange(12, 14)[None])]
        logits = model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **where).logits
        for row, (sample, new) in enumerate(zip([IMAGES, TEXT], [ids[:1], ids[1:, 2:]], strict=True)):
            past = model(**single(model, sample)).past_key_values
            alone = model(input_ids=new, **{CACHE: past}, **alone_where[row]).logits
            torch.testing.assert_close(logits[row, -new.shape[1] :], alone[0], atol=2e-4, rtol=0)
        # What was padding in the second turn stays padding in the third.
        third = torch.randint(20, 100, (2, 1))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        where = {"position_ids": where["position_ids"][..., -1:] + 1}
        logits = model(input_ids=third, attention_mask=mask, **{CACHE: cache}, **where).logits
        past = model(**single(model, TEXT)).past_key_values
        new = torch.cat([ids[1:, 2:], third[1:]], dim=1)
        alone = model(input_ids=new, **{CACHE: past}, **next_positions(model, single(model, TEXT), 3)).logits
        torch.testing.assert_close(logits[1, -1], alone[0, -1], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("family", "kind"), families_and(["image", "both"], KINDS, carries_state=False))
def test_prompt_lookup_equals_greedy(family: str, kind: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    ids, _ = steps(model, inputs, 12)
    looked = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked[:, -12:], ids)


@pytest.mark.parametrize("samples", ["image", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_sequences_score_as_forward_says(family: str, samples: str) -> None:
    skip_where_stock_mixes_images(family, KINDS[samples])
    model = patched(family)
    inputs = inputs_for(model, KINDS[samples])
    torch.manual_seed(3)
    done = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=3,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = done.sequences[:, -4:]
    assert len(new) == 3 * len(KINDS[samples])
    assert len({tuple(row) for row in new.tolist()}) > len(KINDS[samples]), "samples differ"
    for row, ids in enumerate(new):
        prompt = single(model, KINDS[samples][row // 3])
        with torch.no_grad():
            cache = model(**prompt).past_key_values
        positions = next_positions(model, prompt, 4)
        again = text_turn(model, cache, ids[None], positions)
        for step in range(1, 4):
            torch.testing.assert_close(done.logits[step][row], again[0, step - 1], atol=2e-4, rtol=0)


class Collector(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.pieces.append(torch.tensor([-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming(family: str) -> None:
    model, stream = patched(family), Collector()
    inputs = single(model, IMAGE)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=stream)
    assert torch.equal(torch.cat(stream.pieces), torch.cat([ids[0], torch.tensor([-1])]))


@pytest.mark.parametrize(("family", "kind"), families_and(["image", "both"], KINDS))
def test_without_a_cache_the_prompt_ranks(family: str, kind: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    ids, logits = steps(model, inputs)
    again, uncached = steps(model, inputs, use_cache=False)
    assert torch.equal(ids, again)
    for ours, expected in zip(uncached, logits, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_static_cache(family: str, kind: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    ids, logits = steps(model, inputs)
    again, static = steps(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(ids, again)
    for ours, expected in zip(static, logits, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


@needs_tracing
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_step_compiles_to_one_graph(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    caches = [StaticCache(config=model.config.text_config, max_cache_len=300) for _ in range(2)]
    # Neither a break nor a second graph, however long it goes on.
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for cache in caches:
            model(**inputs, **{CACHE: cache})
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        at = torch.tensor([[inputs["input_ids"].shape[1]]])
        positions = next_positions(model, inputs, 1) or {"position_ids": at}
        positions = {name: p.contiguous() for name, p in positions.items()}
        for token in range(30, 94):
            step = {"input_ids": torch.tensor([[token]]), **positions}
            expected = model(**step, **{CACHE: caches[0]}).logits
            torch.testing.assert_close(compiled(**step, **{CACHE: caches[1]}).logits, expected, **CLOSE)
            positions = {name: p + 1 for name, p in positions.items()}
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_operations_carry_the_padding(family: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, RAGGED)
    new = torch.randint(20, 100, (3, 1))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)

    def prefill() -> Any:
        with torch.no_grad():
            return model(**inputs).past_key_values

    def decode(cache: Any, ids: Tensor, rows: Tensor) -> Tensor:
        # What a model keeps of the positions of its last prompt knows nothing of reordering.
        where = family_of(family).explicit(torch.full((len(ids), 1), 300))
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask[rows], **{CACHE: cache}, **where).logits

    everyone = torch.arange(3)
    expected = decode(prefill(), new, everyone)
    order = torch.tensor([2, 0, 1])
    cache = prefill()
    cache.reorder_cache(order)
    torch.testing.assert_close(decode(cache, new[order], order), expected[order], **CLOSE)
    if not family_of(family).carries_state:
        cache = prefill()
        cache.batch_repeat_interleave(2)
        twice = everyone.repeat_interleave(2)
        torch.testing.assert_close(decode(cache, new[twice], twice), expected[twice], **CLOSE)
        cache = prefill()
        picked = torch.tensor([2, 1])
        cache.batch_select_indices(picked)
        torch.testing.assert_close(decode(cache, new[picked], picked), expected[picked], **CLOSE)
    cache = prefill()
    torch.testing.assert_close(decode(copy.deepcopy(cache), new, everyone), expected, **CLOSE)
    torch.testing.assert_close(decode(cache, new, everyone), expected, **CLOSE)


@pytest.mark.parametrize("family", families(carries_state=False))
def test_crop_takes_text_only(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)  # ends with 7 tokens of text
    ids = torch.randint(20, 100, (1, 3))
    positions = next_positions(model, inputs, 3)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    first = text_turn(model, cache, ids, positions)
    cache.crop(-3)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    torch.testing.assert_close(text_turn(model, cache, ids, positions), first, **CLOSE)
    before = key_lengths(cache)
    last = 10 + family_of(family).markers_behind
    with pytest.raises(PatchStateError, match=f"cannot crop 20 tokens: only the last {last} came after"):
        cache.crop(-20)
    assert key_lengths(cache) == before
    cache.crop(-10)


@pytest.mark.skipif(before("5.18"), reason="stock: reset zeroes the keys of a dynamic cache, which stay")
@pytest.mark.parametrize("family", FAMILIES)
def test_reset_cache_starts_again(family: str) -> None:
    model, plain = patched(family), tiny_model(family)
    inputs = single(model, IMAGE)
    with torch.no_grad():
        expected = model(**inputs)
        cache = model(**inputs).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(**inputs, **{CACHE: cache})
        torch.testing.assert_close(again.logits, expected.logits, **CLOSE)
        assert key_lengths(cache) == key_lengths(expected.past_key_values)
        cache.reset()
        stock = plain(**inputs, **{CACHE: cache})
        torch.testing.assert_close(stock.logits, plain(**inputs).logits, **CLOSE)


@needs_ready_features
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_ready_features(family: str) -> None:
    model, plain, known = patched(family), tiny_model(family), family_of(family)
    inputs = single(model, IMAGES)
    with torch.no_grad():
        expected = model(**inputs).logits
        pixels = known.feature_arguments(inputs)["image"]
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        of_ids = [name for name in known.token_inputs if name != "attention_mask"]
        rest = {n: v for n, v in inputs.items() if n not in of_ids}
        where = known.explicit_positions(model, inputs)
        torch.testing.assert_close(model(**rest, inputs_embeds=embeds, **where).logits, expected, **CLOSE)
        bare = known.beside_features(inputs)
        ready = model.get_image_features(**pixels, return_dict=True)
        given = model(**bare, mm_encoder_outputs={"image": ready}).logits
        torch.testing.assert_close(given, expected, **CLOSE)
        # Features that a stock model made have no survivors: only the language stage merges.
        stock = plain.get_image_features(**pixels, return_dict=True)
        model(**bare, mm_encoder_outputs={"image": stock})
    lengths = session_of(model).report.sequence_tokens
    assert lengths[0][0] == inputs["input_ids"].shape[1] > lengths[3][0]


@pytest.mark.parametrize("family", families(carries_state=False))
def test_images_after_a_padded_turn_of_text(family: str) -> None:
    """What was padding before anything merged stays padding afterwards."""
    model = patched(family)
    texts, seconds = [Sample(text_seed=21, text=(9,)), Sample(text_seed=22, text=(4,))], [IMAGES, IMAGE]
    first, second = inputs_for(model, texts), inputs_for(model, seconds)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)

    def positions(rows: list[int], width: int) -> Tensor:
        """Of the second turn, per row as if nothing were padded; left-padded to `width`."""
        tables = []
        for row in rows:
            alone, start = single(model, seconds[row]), sum(texts[row].text)
            table = family_of(family).positions(model, alone)
            tables.append(torch.nn.functional.pad(table + start, (width - table.shape[-1], 0)))
        return torch.cat(tables, dim=-2)

    rest = {n: v for n, v in second.items() if n != "attention_mask"}
    with torch.no_grad():
        turn = {n: first[n] for n in ("input_ids", "attention_mask")}
        cache = model(**turn, position_ids=(turn["attention_mask"].cumsum(1) - 1).clamp_min(0)).past_key_values
        where = positions([0, 1], second["input_ids"].shape[1])
        logits = model(**rest, attention_mask=mask, position_ids=where, **{CACHE: cache}).logits
        for row in range(2):
            past = model(input_ids=single(model, texts[row])["input_ids"]).past_key_values
            alone = {n: v for n, v in single(model, seconds[row]).items() if n != "attention_mask"}
            length = alone["input_ids"].shape[1]
            expected = model(**alone, position_ids=positions([row], length), **{CACHE: past}).logits
            torch.testing.assert_close(logits[row, -length:], expected[0], atol=2e-4, rtol=0)
