"""`patch(keep=...)`: one number, whatever the family, the sizes, the layers; what cannot be reached is said."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from decode_helpers import IMAGE, RICHEST, single
from families import FAMILIES, families, families_and, family_of
from helpers import PROMPTS, VISUAL, assert_says, prompt
from illava_hooks import METHODS, MergeConfigError, MergeReport, MergeSchedule, merging, patch, session_of
from illava_hooks.config import split_keep
from kind_helpers import CACHE
from test_counts import RULES, check_counts, random_samples, with_quota
from tiny_models import Inputs, Sample, inputs_for, tiny_model

LAYERS: dict[str, Any] = {"vit_layers": [1, 2], "llm_layers": [1, 3]}
KEEPS = [0.8, 1 / 2, 1 / 3, 1 / 9]
PROMPTS_OF = families_and(VISUAL, PROMPTS)
WITHIN = 0.02


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the library logged, as it comes."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Listener()
    logging.getLogger("illava_hooks").addHandler(handler)
    yield lines
    logging.getLogger("illava_hooks").removeHandler(handler)


@torch.no_grad()
def run(model: Any, inputs: Inputs) -> MergeReport:
    model(**inputs)
    return session_of(model).report


def nearest(number: float) -> int:
    """The whole number next to a positive one, halves upwards."""
    whole = int(number)
    return whole + (number - whole >= 0.5)


def check_kept(report: MergeReport, keep: float) -> None:
    """Of every image and video the nearest number of tokens is left, and never none."""
    assert report.visuals
    for visual in report.visuals:
        assert visual.language_tokens[-1] == max(1, nearest(keep * visual.prompt_tokens)), (keep, visual)
    whole = sum(visual.prompt_tokens for visual in report.visuals)
    slack = 0.5 * len(report.visuals) / whole
    assert abs(report.kept_fraction - keep) <= max(WITHIN, slack)


# ---------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("name", "kind"), PROMPTS_OF)
def test_what_is_left_is_the_fraction_asked_for(name: str, kind: str, keep: float) -> None:
    model = tiny_model(name)
    patch(model, **LAYERS, keep=keep)
    check_kept(run(model, prompt(model, kind)), keep)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_caches_of_the_last_layers_are_as_long_as_is_said(name: str) -> None:
    """The report is not asked: text and placeholders are counted in the prompt, keys in the cache."""
    model = tiny_model(name)
    inputs = single(model, IMAGE)
    with torch.no_grad():
        last = family_of(model).attending(model)[-1]
        whole = model(**inputs).past_key_values.layers[last].keys.shape[-2]
        # Behind the last layer that holds keys nothing need be shorter.
        merging = [layer for layer in LAYERS["llm_layers"] if layer <= last]
        patch(model, **LAYERS | {"llm_layers": merging}, keep=0.25)
        layers = model(**inputs).past_key_values.layers
    visual = sum(v.prompt_tokens for v in session_of(model).report.visuals)
    left = sum(max(1, nearest(0.25 * v.prompt_tokens)) for v in session_of(model).report.visuals)
    assert layers[last].keys.shape[-2] == whole - visual + left < whole


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"illava-reference"}))
@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_method(name: str, method: str) -> None:
    model = tiny_model(name)
    patch(model, **LAYERS, keep=1 / 3, method=method)
    check_kept(run(model, single(model, RICHEST[name])), 1 / 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", FAMILIES)
def test_one_patch_fits_any_size(name: str, seed: int) -> None:
    """Nothing but the forward knows how many tokens there are."""
    draw, model = random.Random(seed), tiny_model(name)
    keep = draw.choice(KEEPS)
    patch(model, draw.sample(family_of(name).merging_layers, 2), llm_layers=[2], keep=keep)
    for _ in range(3):
        images = tuple((draw.randint(20, 130), draw.randint(20, 130)) for _ in range(draw.randint(1, 2)))
        videos = (4,) if family_of(name).with_videos and draw.random() < 0.4 else ()
        check_kept(run(model, inputs_for(model, [Sample(seed, images=images, videos=videos)])), keep)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_cuts_what_it_brings(name: str) -> None:
    model = tiny_model(name)
    inputs = single(model, IMAGE)
    patch(model, **LAYERS, keep=1 / 3)
    with torch.no_grad():
        first = model(**inputs)
        length = first.past_key_values.get_seq_length()
        mask = torch.ones(1, length + inputs["input_ids"].shape[1], dtype=torch.int64)
        places = torch.arange(length, mask.shape[1])[None]
        explicit = family_of(model).explicit(places)
        model(**{**inputs, "attention_mask": mask, **explicit, CACHE: first.past_key_values})
    check_kept(session_of(model).report, 1 / 3)
    assert session_of(model).report.past_tokens == (length,)


def test_the_check_notices_amounts_that_are_rounded_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation: the language model multiplies fractions instead of closing on the total."""

    def by_ratio(self: MergeSchedule, num_tokens: int, whole: int, most: Any) -> list[int]:
        counts: list[int] = []
        for _ in self.llm_layers:
            counts.append(math.floor((num_tokens - sum(counts)) * (1 - math.sqrt(1 / 3) ** 0.5)))
        return counts

    monkeypatch.setattr(MergeSchedule, "decoder_removed", by_ratio)
    model = tiny_model(FAMILIES[0])
    patch(model, **LAYERS, keep=1 / 3)
    with pytest.raises(AssertionError):
        check_kept(run(model, prompt(model, "images")), 1 / 3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_tell_what_enters_the_language_model(name: str, seed: int) -> None:
    draw, model = random.Random(seed), tiny_model(name)
    layers = draw.sample(family_of(name).merging_layers, 2)
    patch(model, layers, llm_layers=[2], keep=draw.choice(KEEPS), method=with_quota(draw.choice(RULES)))
    check_counts(model, random_samples(draw, name))


# ---------------------------------------------------------------------------- where it is cut


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", families(one_to_one=True))
def test_both_stages_cut_by_the_same_factor(name: str, keep: float) -> None:
    """In equal steps, as far as whole groups allow."""
    model = tiny_model(name)
    patch(model, **LAYERS, keep=keep)
    for visual in run(model, single(model, IMAGE)).visuals:
        group = family_of(name).patches_per_token
        before, between, after = (visual.vision_tokens[index] for index in (0, 2, -1))
        assert abs(between - keep**0.25 * before) <= group and abs(after - keep**0.5 * before) <= group
        entry, between, left = (visual.language_tokens[index] for index in (0, 1, -1))
        assert entry == after // group and abs(between - math.sqrt(entry * left)) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stage_without_layers_leaves_all_to_the_other(name: str, said: list[str]) -> None:
    model = tiny_model(name)
    inputs = single(model, IMAGE)
    patch(model, [], llm_layers=[1, 3], keep=0.5)
    report = run(model, inputs)
    assert {v.vision_tokens[0] == v.vision_tokens[-1] for v in report.visuals} <= {True}
    check_kept(report, 0.5)
    assert said == []
    patch(model, [1, 2], llm_layers=[], keep=0.5)
    for visual in run(model, inputs).visuals:
        assert visual.vision_tokens[-1] == visual.vision_tokens[0] / 2
        assert len(set(visual.language_tokens)) == 1
        if family_of(name).one_to_one:
            assert visual.kept_fraction == 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_come_from_the_preset_where_none_are_given(name: str) -> None:
    model = tiny_model(name)
    amounts = {"vit_r": 4, "llm_ratio": 0.9}
    one, other = {"vit_layers": [1], "llm_layers": [3]}, {"vit_layers": [0, 2], "llm_layers": [1, 2]}
    model.config.illava_presets = {"image": {**one, **amounts}, "video": {**other, **amounts}}
    config = patch(model, keep=0.25).config
    assert config.image == MergeSchedule((1,), 0, (3,), 1.0, 0.25, 0.5)
    assert config.video == MergeSchedule((0, 2), 0, (1, 2), 1.0, 0.25, 0.5)
    config = patch(model, keep=0.25, preset="video", llm_layers=[2]).config
    assert config.image == config.video == MergeSchedule((0, 2), 0, (2,), 1.0, 0.25, 0.5)
    check_kept(run(model, single(model, RICHEST[name])), 0.25)


@pytest.mark.parametrize("seed", range(50))
def test_a_split_never_asks_for_more_than_a_stage_can_do(seed: int) -> None:
    draw = random.Random(seed)
    keep = draw.uniform(0.01, 1)
    encoder, language = (draw.choice([0.0, 0.5, 0.25, 1.0]) for _ in range(2))
    found = split_keep(keep, encoder, language, draw.choice([None, draw.uniform(0.01, 1)]))
    if found is None:
        assert encoder * language > keep
    else:
        assert max(keep, encoder) - 1e-12 <= found <= 1 and keep / found >= language - 1e-12
    assert split_keep(keep) == pytest.approx(keep**0.5)


# ---------------------------------------------------------------------------- nothing to cut


@pytest.mark.parametrize("one", [1, 1.0])
@pytest.mark.parametrize("given", [{}, LAYERS], ids=["preset's layers", "layers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_is_the_unpatched_model_bit_by_bit(name: str, given: dict[str, Any], one: float) -> None:
    model = tiny_model(name)
    inputs = single(model, RICHEST[name])
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True)
        session = patch(model, **given, keep=one)
        found = model(**inputs, output_hidden_states=True)
    assert session.config.image.is_identity and session.config.video.is_identity
    assert torch.equal(found.logits, stock.logits)
    for mine, its in zip(found.hidden_states, stock.hidden_states, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("name", FAMILIES)
def test_switched_off_it_is_the_unpatched_model_bit_by_bit(name: str) -> None:
    model = tiny_model(name)
    inputs = single(model, RICHEST[name])
    with torch.no_grad():
        stock = model(**inputs).logits
        patch(model, **LAYERS, keep=0.5)
        with merging(model, False):
            assert torch.equal(model(**inputs).logits, stock)
        assert not torch.equal(model(**inputs).logits, stock)


# ---------------------------------------------------------------------------- what is refused, and what is said

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vit_r too": ({**LAYERS, "keep": 0.5, "vit_r": 4}, ("^keep is 0.5 and vit_r is 4;", "give keep alone")),
    "vit_r of nothing": ({**LAYERS, "keep": 0.5, "vit_r": 0}, ("^keep is 0.5 and vit_r is 0;", "give keep alone")),
    "llm_ratio too": ({**LAYERS, "keep": 0.5, "llm_ratio": 0.5}, ("and llm_ratio is 0.5;", "give keep alone")),
    "llm_ratio of nothing": ({**LAYERS, "keep": 1, "llm_ratio": 1.0}, ("and llm_ratio is 1.0;", "give keep alone")),
    "no layers": (
        {"vit_layers": [], "llm_layers": [], "keep": 0.5},
        ("^keep is 0.5,", "neither vit_layers nor llm_layers", "keep=1"),
    ),
    "too few layers": (
        {"vit_layers": [1], "llm_layers": [1], "keep": 0.2, "method": "tome"},
        ("^keep is 0.2,", "'tome'", "leave 0.25", "list more layers"),
    ),
    "a deep layer": ({"vit_layers": [9], "llm_layers": [1], "keep": 0.5}, ("^vit_layers contains 9", "0..3")),
} | {
    str(value): ({**LAYERS, "keep": value}, (f"^keep is {re.escape(repr(value))};", r"\(0, 1\]", "use 1 to keep all"))
    for value in (0, -0.5, 1.01, 2, math.nan, math.inf, "a third", True, [0.5])
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", FAMILIES)
def test_is_refused(name: str, case: str) -> None:
    given, words = REFUSED[case]
    model = tiny_model(name)
    with pytest.raises(MergeConfigError) as caught:
        patch(model, **given)
    assert_says(caught.value, *words)
    assert session_of(model) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(MergeConfigError) as caught:
        patch(tiny_model(name), keep=0.5)
    assert_says(caught.value, "^vit_layers contains", "from the preset; give it yourself")


@pytest.mark.parametrize("name", families(one_to_one=True))
def test_too_few_tokens_are_said_once(name: str, said: list[str]) -> None:
    """A cut of a few tokens cannot be as fine as what is asked for."""
    model = tiny_model(name)
    inputs = single(model, IMAGE)
    patch(model, **LAYERS, keep=0.001)
    for _ in range(2):
        report = run(model, inputs)
    assert {v.language_tokens[-1] for v in report.visuals} == {1}
    missed = [v for v in report.visuals if v.kept_fraction - 0.001 > WITHIN]
    assert len(said) == bool(missed)
    if said:
        assert "\n" not in said[0] and said[0].startswith("keep is 0.001,") and "session.report" in said[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_encoder_alone_cannot_reach_is_said_once(name: str, said: list[str]) -> None:
    """It merges no newlines, and what it keeps may be cropped away."""
    model = tiny_model(name)
    inputs = single(model, Sample(1, images=((60, 40),)))
    patch(model, [1, 2], llm_layers=[], keep=0.25)
    for _ in range(2):
        report = run(model, inputs)
    missed = [v for v in report.visuals if abs(v.kept_fraction - 0.25) > WITHIN]
    assert len(said) == bool(missed)


def test_what_cannot_be_reached_is_said_in_some_family(said: list[str]) -> None:
    """So that the test before is about something."""
    for name in families(one_to_one=False):
        model = tiny_model(name)
        patch(model, [1, 2], llm_layers=[], keep=0.25)
        run(model, inputs_for(model, [Sample(1, images=((60, 40),))]))
    assert said
    assert all(line.startswith("keep is 0.25, and of some images another fraction is left") for line in said)
