"""Every refusal, with its text; and that nothing is lost when something goes wrong."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from decode_helpers import IMAGE, SETTINGS, patched, single
from families import families, families_and_methods, family_of
from helpers import assert_says
from illava_hooks import (
    METHODS,
    PRESETS,
    IllavaHooksError,
    MergeConfigError,
    Method,
    PatchStateError,
    UnsupportedModelError,
    merging,
    patch,
    session_of,
)
from illava_hooks.config import MergeSchedule
from illava_hooks.engine import family as engine_family
from illava_hooks.engine import transport
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.finding import families as known_families
from illava_hooks.engine.finding import find_family
from tiny_models import FAMILIES, Sample, inputs_for, tiny_model

#: Every `model_type` that the library knows.
SUPPORTED = sorted(kind for known in known_families() for kind in known.model_types)

GOOD: dict[str, Any] = {"vit_layers": [1], "vit_r": 4, "llm_layers": [1], "llm_ratio": 0.5}

WRONG_VALUES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vit layer too deep": ({"vit_layers": [1, 4]}, ("^vit_layers contains 4;", r"allows 0\.\.3", "choose other")),
    "vit layer negative": ({"vit_layers": [-1]}, ("^vit_layers contains -1;", r"0\.\.3", "choose")),
    "vit layer a bool": ({"vit_layers": [True]}, ("^vit_layers contains True;", r"0\.\.3", "choose")),
    "vit layer a float": ({"vit_layers": [1.0]}, (r"^vit_layers contains 1\.0;", r"0\.\.3", "choose")),
    "vit layers twice": ({"vit_layers": [2, 2]}, (r"^vit_layers is \[2, 2\]", "twice", "list each layer once")),
    "vit layers a number": ({"vit_layers": 5}, ("^vit_layers is 5;", "give a list", r"0\.\.3")),
    "vit layers a word": ({"vit_layers": "1-2"}, ("^vit_layers is '1-2';", "give a list", r"0\.\.3")),
    "vit_r negative": ({"vit_r": -3}, ("^vit_r is -3;", ">= 0", r"\(0, 1\)", "use 0")),
    "vit_r one": ({"vit_r": 1.0}, (r"^vit_r is 1\.0;", r"\(0, 1\)", "use 0")),
    "vit_r above one": ({"vit_r": 1.5}, (r"^vit_r is 1\.5;", r"\(0, 1\)", "use 0")),
    "vit_r nan": ({"vit_r": math.nan}, ("^vit_r is nan;", r"\(0, 1\)", "use 0")),
    "vit_r a word": ({"vit_r": "92"}, ("^vit_r is '92';", "int >= 0", r"\(0, 1\)", "give")),
    "vit_r a bool": ({"vit_r": True}, ("^vit_r is True;", "int >= 0", "give")),
    "llm layer zero": ({"llm_layers": [0]}, ("^llm_layers contains 0;", r"1\.\.3", "scores of the one before")),
    "llm layer too deep": ({"llm_layers": [9]}, ("^llm_layers contains 9;", r"1\.\.3", "choose")),
    "llm layers twice": ({"llm_layers": [1, 1]}, (r"^llm_layers is \[1, 1\]", "twice", "once")),
    "ratio zero": ({"llm_ratio": 0.0}, (r"^llm_ratio is 0\.0;", r"\(0, 1\]", r"use 1\.0")),
    "ratio above one": ({"llm_ratio": 1.2}, (r"^llm_ratio is 1\.2;", r"\(0, 1\]", r"use 1\.0")),
    "ratio nan": ({"llm_ratio": math.nan}, ("^llm_ratio is nan;", r"\(0, 1\]", r"use 1\.0")),
    "ratio a word": ({"llm_ratio": "0.7"}, (r"^llm_ratio is '0\.7';", r"\(0, 1\]", r"use 1\.0")),
    "method unknown": ({"method": "best"}, ("^method is 'best';", "'illava'", "choose one of", "Method object")),
    "preset unknown": ({"preset": "audio"}, ("^preset is 'audio';", "'image', 'video', 'auto'", "choose")),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_values(family: str, case: str) -> None:
    wrong, parts = WRONG_VALUES[case]
    model = tiny_model(family)
    with pytest.raises(MergeConfigError) as caught:
        patch(model, **{**GOOD, **wrong})
    assert_says(caught.value, *parts)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, IllavaHooksError)
    assert session_of(model) is None


@pytest.mark.parametrize("family", families(with_tiles=True))
def test_no_token_left_in_a_tile(family: str) -> None:
    tile = family_of(family).tile_patches
    half = -(-tile // 2)
    with pytest.raises(MergeConfigError) as caught:
        patch(tiny_model(family), [1, 2], half, [1], 0.5)
    assert_says(
        caught.value, f"^vit_r is {half}:", "2 layers", f"none of the {tile} tokens", f"use at most {half - 1}"
    )
    patch(tiny_model(family), [1, 2], half - 1, [1], 0.5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in PRESETS])
def test_preset_layers_that_the_model_lacks(family: str) -> None:
    model = tiny_model(family)
    first = min(layer for layer in find_family(model).presets_of(model)["image"].vit_layers if layer > 3)
    with pytest.raises(MergeConfigError) as caught:
        patch(model)
    assert_says(caught.value, f"^vit_layers contains {first}", "from the preset; give it yourself", r"0\.\.3")


def test_a_method_is_checked_when_made() -> None:
    with pytest.raises(MergeConfigError) as caught:
        Method("mine", encoder_score="last_query_attention")
    assert_says(caught.value, "^encoder_score is 'last_query_attention'", "'received_attention'", "function")
    with pytest.raises(MergeConfigError, match="^merge is 'glue'; choose one of"):
        Method("mine", merge="glue")
    with pytest.raises(MergeConfigError, match="^layout is 'round'; choose one of"):
        Method("mine", layout="round")  # type: ignore[arg-type]


@pytest.mark.parametrize("found", [None, 3.0], ids=["none", "number"])
def test_a_rule_that_decides_nothing(found: Any) -> None:
    model = patched(FAMILIES[0], method=Method("mine", merge=lambda inputs: found))
    with pytest.raises(MergeConfigError) as caught:
        model(**single(model, IMAGE))
    assert_says(caught.value, f"^the merge rule of method 'mine' returned {type(found).__name__}", "a SegmentPlan or")


def test_what_stands_in_the_place_of_layers() -> None:
    """A method's name is told its argument; other words are not taken for one."""
    with pytest.raises(MergeConfigError, match="^vit_layers is 'diverse'.*, or method='diverse'$"):
        patch(tiny_model(FAMILIES[0]), "diverse")  # type: ignore[arg-type]
    with pytest.raises(MergeConfigError, match="^vit_layers is '1-2'; give a list of layer numbers in [^,]*$"):
        patch(tiny_model(FAMILIES[0]), "1-2")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "a word", None], ids=["module", "word", "none"])
def test_things_that_are_no_model(model: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model)
    assert_says(caught.value, type(model).__name__, f"supported are {re.escape(str(SUPPORTED))}", "give one")
    assert ("loaded with from_pretrained" in str(caught.value)) == isinstance(model, str)


def test_another_model() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model)
    assert_says(caught.value, "Qwen2ForCausalLM", "'qwen2'", f"supported are {re.escape(str(SUPPORTED))}")


@pytest.mark.parametrize("family", FAMILIES)
def test_sliding_windows(family: str) -> None:
    model = tiny_model(family)
    text = model.config.text_config
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * 4
    text.layer_types = [kinds[0], "sliding_attention", *kinds[2:]]
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **GOOD)
    assert_says(caught.value, "use_sliding_window", "full attention", "load the model with")


@pytest.mark.parametrize("layer", [DynamicSlidingWindowLayer, StaticSlidingWindowLayer])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliding_layer_in_a_given_cache(family: str, layer: type) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    expected = model(**inputs).logits
    cache = DynamicCache(config=model.config.text_config)
    cache.layers[0] = layer(sliding_window=16, **({"max_cache_len": 400} if "Static" in layer.__name__ else {}))
    with pytest.raises(PatchStateError) as caught:
        model(**inputs, **{CACHE: cache})
    said = (f"^{CACHE} has a {layer.__name__} at layer 0", "full-attention", "use DynamicCache or StaticCache")
    assert_says(caught.value, *said)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("family", families(carries_state=False))
def test_cropping_into_merged_tokens(family: str) -> None:
    model = patched(family)
    with torch.no_grad():
        cache = model(**single(model, IMAGE)).past_key_values  # 7 tokens of text behind the image
        length = cache.get_seq_length()
        with pytest.raises(PatchStateError) as caught:
            cache.crop(-20)
    last = 7 + family_of(family).markers_behind
    said = (
        "^cannot crop 20 tokens",
        f"only the last {last} came after merged visual tokens",
        "start from a new cache",
    )
    assert_says(caught.value, *said)
    assert cache.get_seq_length() == length


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seam_that_a_release_renamed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    monkeypatch.delattr(type(model.model), family_of(family).seam)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **GOOD)
    assert_says(caught.value, "lacks 'get_placeholder_mask'", "transformers 5", "use a version")
    assert session_of(model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_release_that_renamed_the_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.24 did, which is known."""
    model = tiny_model(family)

    def forward(self: Any, input_ids: Any = None, memory: Any = None, **kwargs: Any) -> None: ...

    monkeypatch.setattr(type(family_of(family).language(model)), "forward", forward)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **GOOD)
    assert_says(caught.value, f"lacks '{CACHE}'", "transformers 5", "use a version")
    assert session_of(model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_release_whose_masks_cannot_be_told_not_to_look(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As up to transformers 5.14: there a mask of ones is looked at, which waits for the device."""
    model = tiny_model(family)
    monkeypatch.setattr(engine_family, "create_causal_mask", lambda config, inputs_embeds, attention_mask: None)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **GOOD)
    assert_says(caught.value, "lacks 'allow_is_causal_skip'", "transformers 5", "use a version")
    assert session_of(model) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_results_before_a_forward(family: str) -> None:
    session = patch(tiny_model(family), **GOOD)
    with pytest.raises(PatchStateError, match="^no report yet: run the model on an image"):
        _ = session.report.flops


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_an_unpatched_model(family: str) -> None:
    with pytest.raises(PatchStateError, match="is not patched; call patch"), merging(tiny_model(family), False):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill(family: str) -> None:
    model = patched(family)
    with pytest.raises(PatchStateError) as caught:
        model.generate(**single(model, IMAGE), max_new_tokens=2, prefill_chunk_size=16)
    assert_says(caught.value, "^prefill_chunk_size is 16;", "use prefill_chunk_size=None", "merging")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    length = inputs["input_ids"].shape[1]
    restarting = torch.cat([torch.arange(length - 4), torch.arange(4)])[None]
    positions = family_of(family).packed(restarting)
    with pytest.raises(PatchStateError) as caught:
        model(**{**inputs, "attention_mask": None}, position_ids=positions, use_cache=False)
    assert_says(caught.value, "^position_ids restart", "packed", "pad instead")


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_the_users_own(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    length = inputs["input_ids"].shape[1]
    where = family_of(family).explicit(torch.arange(length)[None])
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with pytest.raises(PatchStateError) as caught:
        model(**inputs, **where)
    assert_says(caught.value, "^attention_mask is a Tensor", rf"\(1, 1, {length}, {length}\)", "2-D padding mask")


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"vit_r": 0, "llm_ratio": 0.2}, "llm_ratio of {} asks for 0.8 of the tokens"),
        ({"vit_r": 0.7, "llm_ratio": 1.0}, "vit_r of {} asks for 0.7 of the tokens"),
        ({"vit_r": 0.5, "llm_ratio": 0.5}, ""),
        ({"keep": 0.5}, ""),
    ],
    ids=str,
)
def test_what_a_method_cannot_remove_is_said(
    numbers: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(FAMILIES[0])
    layers: dict[str, Any] = {"vit_layers": [1], "llm_layers": [1]}
    patch(model, **layers, **numbers, method="tome")
    said = [record.getMessage() for record in caplog.records if record.name == "illava_hooks"]
    expected = [told.format(kind) for kind in ("images", "videos")] if told else []
    assert [message.partition(" of a layer, and method 'tome' removes 0.5 at most")[0] for message in said] == expected
    caplog.clear()
    patch(model, **layers, **numbers, method="nearest")
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_small_images_are_clamped_and_said_once(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(family)
    known = family_of(family)
    patch(model, list(known.merging_layers), 12 if known.with_tiles else 24, [1], 0.01)
    samples = [Sample(text_seed=1, images=((16, 16), (24, 16))), Sample(text_seed=2, images=((48, 30), (8, 8)))]
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="illava_hooks"):
        for _ in range(2):
            logits = model(**inputs_for(model, samples)).logits
    assert logits.isfinite().all()
    assert all(visual.language_tokens[-1] >= 1 for visual in session_of(model).report.visuals)
    said = [record.getMessage() for record in caplog.records if record.name == "illava_hooks"]
    if known.with_tiles:
        assert said == []  # they are always whole
    else:
        assert len(said) == 1 and said[0].startswith("vit_r is 24, more than some images") and "\n" not in said[0]


class Failure(RuntimeError):
    """What a hook of the test raises."""


def places(model: Any) -> dict[str, Any]:
    known = family_of(model)
    language = known.language(model)
    vision: Any = known.encoder_layers(model)
    return {
        "encoder layer": vision[2],
        "merging encoder layer's MLP": vision[1].mlp,
        "projector": known.projector(model),
        "decoder layer": language.layers[2],
        "scored attention": language.layers[0].self_attn.q_proj,
        "norm": language.norm,
    }


@pytest.mark.parametrize("place", places(tiny_model(FAMILIES[0])))
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_leaves_the_next_forward_right(family: str, place: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    with torch.no_grad():
        expected = model(**inputs).logits

        def fail(*_: Any) -> None:
            raise Failure

        handle = places(model)[place].register_forward_hook(fail)
        with pytest.raises(Failure):
            model(**inputs)
        with pytest.raises(Failure):
            model.generate(**inputs, max_new_tokens=2)
        handle.remove()
        assert torch.equal(model(**inputs).logits, expected)
        text = torch.randint(20, 100, (1, 5))
        with merging(model, False):
            stock = model(input_ids=text).logits
        assert torch.equal(model(input_ids=text).logits, stock)
    assert not transport.running_forward() and not transport.current_generation() and not transport.in_features()


@pytest.mark.parametrize(("family", "method"), families_and_methods(METHODS))
def test_every_method_has_a_schedule_it_can_run(family: str, method: str) -> None:
    """No name in METHODS is refused with the identity settings."""
    patch(tiny_model(family), [], 0, [], 1.0, method=method)


@pytest.mark.parametrize("family", FAMILIES)
def test_numpy_numbers_are_numbers(family: str) -> None:
    numbers: Any = np.arange(1, 3), np.int64(4), [np.int32(2)], np.float32(0.5)
    session = patch(tiny_model(family), *numbers)
    assert session.config.image == MergeSchedule((1, 2), 4, (2,), 0.5)
    assert type(session.config.image.vit_layers[0]) is int and "encoder layers [1, 2]" in repr(session)


def test_settings_of_the_helpers_are_accepted() -> None:
    assert all(patch(tiny_model(family), **SETTINGS[family]).enabled for family in FAMILIES)
