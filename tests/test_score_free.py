"""Methods without an attention score: nothing is listened to, and no question decides what merges."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import families, families_and, family_of
from helpers import MERGING, assert_differ
from illava_hooks import METHODS, Method, patch
from illava_hooks.engine import attention_tap
from illava_hooks.engine.attention_tap import AttentionTap, EncoderTap
from illava_hooks.merge import scores
from kind_helpers import CACHE, CLOSE, decoder_layers, prompt_positions, vision_layers
from tiny_models import FAMILIES, IMAGE_ID, VIDEO_ID, Inputs, Sample, inputs_for, tiny_model

#: Every named method without an attention score in the encoder, weighing tokens by size or not.
NOVEL = {
    name + ("" if sizes else ", no sizes"): replace(METHODS[name], name=f"{name} {sizes}", proportional=sizes)
    for name in ("novel", "novel-agnostic", "selective")
    for sizes in (True, False)
}
AGNOSTIC = {name: method for name, method in NOVEL.items() if not method.listens_in_llm}
#: Any other rule and order by place is as blind.
BLIND = {**AGNOSTIC, "random": METHODS["random"]}
#: One visual with text in front of it and behind it.
KINDS = {
    "image": (Sample(1, images=((60, 64),), text=(5, 7)),),
    "video": (Sample(3, videos=(4,), text=(5, 7)),),
}
WITH_VISUAL = families_and(KINDS, KINDS)


def patched(family: str, method: Method, **changes: Any) -> tuple[Any, Any]:
    """A tiny model in double precision, and its session."""
    model = tiny_model(family, dtype=torch.float64)
    return model, patch(model, **{**MERGING, **changes}, method=method, track=True)


def exact(family: str) -> float:
    """What counts as the same in double precision; some stock layers compute in less."""
    return max(1e-8, family_of(family).closest)


def cut(inputs: Inputs, positions: Tensor, first: int, last: int) -> dict[str, Any]:
    """The columns ``first .. last - 1`` of one prompt, behind a cache with those before; pixels with their tokens."""
    width = inputs["input_ids"].shape[1]
    along = {name for name, value in inputs.items() if value.dim() == 2 and value.shape[1] == width}
    mine = {name: inputs[name][:, first:last] for name in along}
    ids = mine["input_ids"]
    if ((ids == IMAGE_ID) | (ids == VIDEO_ID)).any():
        mine |= {name: value for name, value in inputs.items() if name not in along}
    return {**mine, "attention_mask": inputs["attention_mask"][:, :last], "position_ids": positions[..., first:last]}


@torch.no_grad()
def in_chunks(model: Any, inputs: Inputs, borders: Sequence[int]) -> Tensor:
    """Logits of one prompt that is given piece by piece."""
    positions, cache, found = prompt_positions(model, inputs), family_of(model).new_cache(model), []
    for first, last in zip((0, *borders), (*borders, inputs["input_ids"].shape[1]), strict=True):
        found.append(model(**cut(inputs, positions, first, last), **{CACHE: cache}).logits)
    return torch.cat(found, 1)


def visual_columns(inputs: Inputs) -> tuple[int, int]:
    """Where the only visual of a prompt begins, and one past its end."""
    ids = inputs["input_ids"][0]
    columns = ((ids == IMAGE_ID) | (ids == VIDEO_ID)).nonzero().flatten().tolist()
    return columns[0], columns[-1] + 1


def asked(inputs: Inputs, seed: int, count: int) -> Inputs:
    """The same prompt with so many tokens of another text behind its visual."""
    _, end = visual_columns(inputs)
    width = inputs["input_ids"].shape[1]
    text = torch.randint(20, 100, (1, count), generator=torch.Generator().manual_seed(seed))
    found = dict(inputs)
    for name, value in inputs.items():
        if value.dim() == 2 and value.shape[1] == width:
            behind = {"input_ids": text, "attention_mask": torch.ones_like(text)}.get(name, torch.zeros_like(text))
            found[name] = torch.cat([value[:, :end], behind.to(value.dtype)], 1)
    return found


def left(session: Any) -> dict[str, list[list[int]]]:
    """Who stays behind every merge of both stages, by place."""
    return {
        f"{stage} {layer}": [image.seats.tolist() for image in session.provenance.at(stage, layer).images]
        for stage, layers in (("vision", MERGING["vit_layers"]), ("language", MERGING["llm_layers"]))
        for layer in layers
    }


class TestNothingIsHeard:
    """Queries and keys stay where they are, and no score runs."""

    @pytest.fixture
    def open_taps(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What listens to any attention while a model runs."""
        found: list[Any] = []
        inner = AttentionTap.__init__

        def begin(tap: AttentionTap, listener: Any) -> None:
            found.append(listener)
            inner(tap, listener)

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("an attention score was computed")

        monkeypatch.setattr(AttentionTap, "__init__", begin)
        monkeypatch.setattr(attention_tap, "attend_and_receive", refused)
        for name in ("received_attention", "query_lse"):
            monkeypatch.setitem(scores.SCORES, name, refused)
        return found

    @pytest.mark.parametrize("name", NOVEL)
    @pytest.mark.parametrize(("family", "kind"), WITH_VISUAL)
    @torch.no_grad()
    def test_in_either_stage(self, family: str, kind: str, name: str, open_taps: list[Any]) -> None:
        model, session = patched(family, NOVEL[name])
        open_taps.clear()  # ``patch`` itself asks the layers that will rank
        model(**inputs_for(model, KINDS[kind]))
        assert 0 < session.report.kept_fraction < 0.5
        encoder = [tap for tap in open_taps if isinstance(tap, EncoderTap)]
        # Weighing by size adds to logits, and needs no look at them.
        assert bool(encoder) == NOVEL[name].proportional
        assert all(not tap.ranks and not tap.received and not tap._heard for tap in encoder)
        assert len(open_taps) - len(encoder) == (0 if name in AGNOSTIC else len(MERGING["llm_layers"]))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_attention_layers_are_left_alone(self, family: str) -> None:
        """No layer has another configuration, so layers with an attention of their own making can merge as well."""
        model = tiny_model(family)
        before = [vars(module).get("config") for module in model.modules()]
        patch(model, **MERGING, method=NOVEL["novel-agnostic, no sizes"])
        after = [vars(module).get("config") for module in model.modules()]
        assert all(ours is theirs for ours, theirs in zip(after, before, strict=True))
        patch(model, **MERGING, method="diverse")
        heard = [vars(module).get("config") for module in model.modules()]
        assert sum(ours is not theirs for ours, theirs in zip(heard, before, strict=True)) > 1

    @pytest.mark.parametrize("family", families())
    @torch.no_grad()
    def test_an_attention_that_cannot_be_heard(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that knows no back-ends of transformers, in both stages, where ``diverse`` is refused."""
        model = tiny_model(family, attn_implementation="eager")
        inputs = inputs_for(model, KINDS["image"])
        patch(model, **MERGING, method=NOVEL["novel-agnostic, no sizes"])
        expected = model(**inputs).logits
        layers = [family_of(model).encoder_attention(layer) for layer in vision_layers(model)]
        layers += [layer.self_attn for layer in decoder_layers(model) if hasattr(layer, "self_attn")]
        for attention in layers:
            monkeypatch.setattr(attention, "config", _Deaf(attention.config))
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)


class _Deaf:
    """A configuration that always names stock's eager back-end, whoever listens."""

    _attn_implementation = "eager"

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize(("family", "kind"), WITH_VISUAL)
@torch.no_grad()
def test_the_same_tokens_stay_whatever_is_asked(family: str, kind: str, name: str) -> None:
    """With any question, a longer one, or none at all behind the visual; a query's attention would see to others."""
    found: dict[str, list[Any]] = {name: [], "fastv": []}
    for method in found:
        model, session = patched(family, {**METHODS, **BLIND}[method])
        inputs = inputs_for(model, KINDS[kind])
        for seed, count in ((0, 7), (1, 7), (2, 23), (3, 0)):
            given = asked(inputs, seed, count)
            model(**given, position_ids=prompt_positions(model, given))
            found[method].append(left(session))
    assert all(one == found[name][0] for one in found[name])
    assert any(one != found["fastv"][0] for one in found["fastv"]), "otherwise no question would tell"


@pytest.mark.parametrize("name", AGNOSTIC)
@pytest.mark.parametrize(("family", "kind"), WITH_VISUAL)
@torch.no_grad()
def test_chunks_are_the_whole(family: str, kind: str, name: str) -> None:
    """Cut at any border of the visual or in the text around it; a query's attention cannot know what follows."""
    model, _ = patched(family, AGNOSTIC[name])
    inputs = inputs_for(model, KINDS[kind])
    whole = model(**inputs, position_ids=prompt_positions(model, inputs)).logits
    first, end = visual_columns(inputs)
    for borders in ((end,), (first, end), (first - 2, end + 1, end + 3)):
        torch.testing.assert_close(in_chunks(model, inputs, borders), whole, atol=exact(family), rtol=0)
    model, _ = patched(family, METHODS["fastv"])
    whole = model(**inputs, position_ids=prompt_positions(model, inputs)).logits
    assert_differ(in_chunks(model, inputs, (end,)), whole)


@pytest.mark.parametrize("name", AGNOSTIC)
@pytest.mark.parametrize(("family", "kind"), WITH_VISUAL)
@torch.no_grad()
def test_a_prefix_serves_another_question(family: str, kind: str, name: str) -> None:
    """A cache that was filled under one question, cut behind the visual, gives another question what it gets alone."""
    model, _ = patched(family, AGNOSTIC[name])
    inputs = inputs_for(model, KINDS[kind])
    _, end = visual_columns(inputs)
    for seed, count in ((1, 7), (2, 11)):
        given = asked(inputs, seed, count)
        positions = prompt_positions(model, given)
        expected = model(**given, position_ids=positions).logits[:, end:]
        prefix = family_of(model).new_cache(model)
        if family_of(model).carries_state:  # what a state has read cannot be taken back
            model(**cut(given, positions, 0, end), **{CACHE: prefix})
            prefix = copy.deepcopy(prefix)
        else:
            other = asked(inputs, 0, 5)
            model(**other, position_ids=prompt_positions(model, other), **{CACHE: prefix})
            prefix.crop(-5)
        found = model(**cut(given, positions, end, end + count), **{CACHE: prefix}).logits
        torch.testing.assert_close(found, expected, atol=exact(family), rtol=0)


def test_functions_of_ones_own_are_always_served() -> None:
    """Nobody knows what they look at."""
    assert not METHODS["novel-agnostic"].listens_in_encoder and not METHODS["novel-agnostic"].listens_in_llm
    assert not METHODS["novel"].listens_in_encoder and METHODS["novel"].listens_in_llm
    assert not METHODS["random"].listens_in_encoder
    own = (
        Method("score", lambda inputs: inputs.key.sum((1, 3)), "uniform", merge="diverse"),
        Method("rule", "uniform", "uniform", merge=lambda inputs: scores_rule(inputs)),
        METHODS["tome"],
    )
    assert all(method.listens_in_encoder for method in own)
    assert [method.listens_in_llm for method in own] == [False, True, True]
    assert not Method("same", scores.uniform, scores.uniform, merge="diverse").listens_in_encoder


def scores_rule(inputs: Any) -> Any:
    """Any rule of one's own."""
    return METHODS["fastv"].rule(inputs)
