"""A merge that was planned runs, or the forward raises, or a line of the log says once why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decode_helpers import IMAGE, IMAGES, RICHEST, SETTINGS, TEXT, patched, single, stock_keeps_images_apart
from families import families, family_of
from helpers import (
    assert_differ,
    assert_same,
    assert_says,
    feature_arguments,
    forward,
    generate,
    needs_ready_features,
)
from illava_hooks import PatchStateError, merging, patch, session_of, tiny, unpatch
from kind_helpers import CLOSE, decoder_layers, prompt_positions, said, tower, vision_layers
from tiny_models import FAMILIES, Inputs, tiny_model

# ------------------------------------------------------------------------------ features made by hand


def image_arguments(model: Any, inputs: Inputs) -> dict[str, Any]:
    return feature_arguments(model, inputs)["image"]


def by_hand(model: Any, inputs: Inputs, features: list[Tensor]) -> Inputs:
    """Inputs of a call that gets embeddings with the image's features in them, and no pixels."""
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == 5)[..., None], torch.cat(features).to(embeds))
    where = prompt_positions(model, inputs)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "position_ids": where}


@pytest.mark.parametrize("caller", ["head", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_built_from_features(family: str, caller: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only the encoder merged, or nothing: said once, in whichever of the two calls."""
    model = patched(family)
    inputs = single(model, IMAGE)
    called = model if caller == "head" else model.model
    with torch.no_grad():
        for _ in range(2):
            features = called.get_image_features(**image_arguments(model, inputs), return_dict=True).pooler_output
            called(**by_hand(model, inputs, list(features)))
    assert len(said(caplog, "merge")) == 1
    (message,) = said(caplog, "merge")
    assert "\n" not in message and ("features" in message or "encoder" in message)


@pytest.mark.parametrize("caller", ["head", "base"])
@pytest.mark.parametrize(
    ("family", "modality"), [(name, modality) for name in FAMILIES for modality in family_of(name).modalities]
)
def test_features_outside_of_a_forward(
    family: str, modality: str, caller: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The language stage would merge and may never hear of them."""
    model = patched(family)
    inputs = single(model, RICHEST[family])
    called = model if caller == "head" else model.model
    with torch.no_grad():
        for _ in range(2):
            getattr(called, f"get_{modality}_features")(**feature_arguments(model, inputs)[modality])
    assert len(said(caplog, "features")) == 1


#: Calls of the tower itself, which hand nothing over to the language stage.
def run_tower(model: Any, inputs: Inputs) -> Any:
    pixels, named = family_of(model).tower_arguments(inputs)
    return tower(model)(pixels, **named)


def run_tower_with_hidden_states(model: Any, inputs: Inputs) -> Any:
    pixels, named = family_of(model).tower_arguments(inputs)
    return tower(model)(pixels, *named.values(), output_hidden_states=True)


def run_tower_forward(model: Any, inputs: Inputs) -> Any:
    pixels, named = family_of(model).tower_arguments(inputs)
    return tower(model).forward(pixels, **named)


TOWER_CALLS = {
    "call": run_tower,
    "hidden states": run_tower_with_hidden_states,
    "forward": run_tower_forward,
}


@pytest.mark.parametrize("call", TOWER_CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_called_directly(family: str, call: str, caplog: pytest.LogCaptureFixture) -> None:
    """Outside nothing changes shape; and it is said once what merged there and what did not."""
    model = patched(family)
    inputs = single(model, IMAGE)
    with torch.no_grad():
        expected = TOWER_CALLS[call](tiny_model(family), inputs)
        found = [TOWER_CALLS[call](model, inputs) for _ in range(2)][-1]
    assert found.last_hidden_state.shape == expected.last_hidden_state.shape
    if expected.pooler_output is not None:
        assert found.pooler_output.shape == expected.pooler_output.shape
    assert len(said(caplog, "merge")) == 1


#: Uses in which all that was planned happens, or nothing was planned.
FINE: dict[str, Callable[[Any, Inputs], Any]] = {
    "forward": lambda model, x: model(**x),
    "base model": lambda model, x: model.model(**x),
    "generate": lambda model, x: model.generate(**x, max_new_tokens=2),
    "beams": lambda model, x: model.generate(**x, max_new_tokens=2, num_beams=2),
    "no cache": lambda model, x: model.generate(**x, max_new_tokens=2, use_cache=False),
    "text": lambda model, x: model(**single(model, TEXT)),
    "text embeddings": lambda model, x: model(
        inputs_embeds=model.get_input_embeddings()(single(model, TEXT)["input_ids"])
    ),
    "both kinds": lambda model, x: model(**single(model, RICHEST[family_of(model).name])),
    "switched off": lambda model, x: switched_off(model, x),
}


def switched_off(model: Any, inputs: Inputs) -> None:
    with merging(model, False):
        run_tower(model, inputs)
        model.get_image_features(**image_arguments(model, inputs))


@pytest.mark.parametrize("use", FINE)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_said_where_all_is_well(family: str, use: str, caplog: pytest.LogCaptureFixture) -> None:
    model = patched(family)
    # Where stock mixes a prompt's images among beams, merging is refused.
    several = use != "beams" or stock_keeps_images_apart(family)
    with torch.no_grad():
        FINE[use](model, single(model, IMAGES if several else IMAGE))
    assert said(caplog) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_an_encoder_that_alone_merges(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Everything planned has happened."""
    model = tiny_model(family)
    patch(model, **{**SETTINGS[family], "llm_layers": []})
    inputs = single(model, IMAGE)
    with torch.no_grad():
        expected = tiny_model(family).get_image_features(**image_arguments(model, inputs), return_dict=True)
        found = model.get_image_features(**image_arguments(model, inputs), return_dict=True)
    assert_differ(found.pooler_output[0], expected.pooler_output[0])
    assert [len(f) for f in found.pooler_output] == [len(f) for f in expected.pooler_output]
    assert not said(caplog, "features")


@needs_ready_features
@pytest.mark.parametrize("family", families(embedded=True))
def test_the_embedded_models_say_it_too(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """A trained model and a real processor."""
    from PIL import Image

    model, processor = tiny.load(family)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many triangles ?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    with Image.open(tiny.media("scene.png")) as picture:
        inputs = dict(processor(text=[text], images=[[picture]], return_tensors="pt"))
    patch(model)
    with torch.no_grad():
        model(**inputs)
        assert said(caplog) == [] and session_of(model).report.kept_fraction < 1
        names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
        model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    assert len(said(caplog, "features")) == 1


# ------------------------------------------------------------------------- a merge that is planned and cannot run


def bypass(layer: nn.Module) -> None:
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states


def hookless(module: nn.Module) -> None:
    """Takes all hooks off, as tools that export or trace do."""
    for part in module.modules():
        part._forward_pre_hooks.clear()
        part._forward_pre_hooks_with_kwargs.clear()
        part._forward_hooks.clear()
        part._forward_hooks_with_kwargs.clear()
        part._forward_hooks_always_called.clear()


def stock_class(layer: nn.Module, family: str, index: int, which: Any) -> None:
    """Gives a layer its stock class back."""
    layer.__class__ = type(which(tiny_model(family))[index])


def attention_that_skips(model: Any, index: int) -> None:
    """An attention that gives zeros: no projection of it runs."""
    attention = decoder_layers(model)[index].self_attn
    attention.forward = lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)


def swap_layer(model: Any, which: Callable[[Any], nn.ModuleList], index: int) -> None:
    """Puts another layer of the stock class there, one that does nothing."""
    layer = which(tiny_model(family_of(model).name))[index]
    bypass(layer)
    which(model)[index] = layer


#: What breaks, and what the error names; both stages merge in layer 1, the encoder in 2 and the decoder in 3 too.
BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward of a vision layer": (lambda model: bypass(vision_layers(model)[1]), r"vision|encoder|vit"),
    "forwards of all vision layers": (
        lambda model: [bypass(layer) for layer in vision_layers(model)],
        r"vision|encoder|vit",
    ),
    "a vision layer": (lambda model: swap_layer(model, vision_layers, 2), r"vision|encoder|vit"),
    "class of a vision layer": (
        lambda model: stock_class(vision_layers(model)[1], family_of(model).name, 1, vision_layers),
        r"vision|encoder|vit",
    ),
    "hooks of a vision layer": (lambda model: hookless(vision_layers(model)[1]), r"vision|encoder|vit"),
    "hooks of the tower": (lambda model: hookless(tower(model)), r"vision|encoder|vit"),
    "a decoder layer": (lambda model: swap_layer(model, decoder_layers, 3), r"decoder|language|llm"),
    "the decoder layer in front": (lambda model: swap_layer(model, decoder_layers, 2), r"decoder|language|llm"),
    "forward of the decoder layer in front": (lambda model: bypass(decoder_layers(model)[2]), r"decoder|language|llm"),
    "forward of a decoder layer": (lambda model: bypass(decoder_layers(model)[3]), r"decoder|language|llm"),
    "attention of the layer in front": (
        lambda model: attention_that_skips(model, 2),
        r"decoder|language|llm|attention",
    ),
    "hooks of a decoder layer": (lambda model: hookless(decoder_layers(model)[3]), r"decoder|language|llm"),
    "hooks of an attention": (lambda model: hookless(decoder_layers(model)[2].self_attn), r"decoder|language|llm"),
    "hooks of the language model": (lambda model: hookless(family_of(model).language(model)), r"decoder|language|llm"),
}


def widths(model: Any, inputs: Inputs) -> tuple[list[int], dict[str, Tensor]]:
    """Tokens that reach the final norm of the language model, and all that a forward gives."""
    seen: list[int] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    handle = family_of(model).language(model).norm.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            out = model(**inputs)
    finally:
        handle.remove()
    return seen, {"logits": out.logits}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_that_does_not_run_is_missed(family: str, broken: str) -> None:
    """A `PatchStateError` names the part; or the merges ran after all, as many tokens as planned."""
    model, whole = patched(family), patched(family)
    inputs = single(model, IMAGE)
    planned, expected = widths(whole, inputs)
    report = session_of(whole).report
    breaks, part = BROKEN[broken]
    breaks(model)
    try:
        seen, found = widths(model, inputs)
    except PatchStateError as error:
        assert_says(error, part, "merg")
    else:
        assert seen == planned and session_of(model).report == report
        if "hooks" in broken or "class" in broken:  # all else is as it was
            torch.testing.assert_close(found["logits"], expected["logits"], **CLOSE)


@pytest.mark.parametrize(
    ("call", "broken"),
    [
        (call, broken)
        for call in ("base model", "generate", "features", "padded batch")
        for broken in ("forward of a vision layer", "a vision layer", "a decoder layer")
        if (call, broken) != ("features", "a decoder layer")
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_missed_however_the_model_is_called(family: str, call: str, broken: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    breaks, part = BROKEN[broken]
    breaks(model)
    calls: dict[str, Callable[[], Any]] = {
        "base model": lambda: model.model(**inputs),
        "generate": lambda: model.generate(**inputs, max_new_tokens=2),
        "features": lambda: model.get_image_features(**image_arguments(model, inputs)),
        "padded batch": lambda: model(**single(model, IMAGES)),
    }
    with torch.no_grad(), pytest.raises(PatchStateError) as caught:
        calls[call]()
    assert_says(caught.value, part)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_broken_is_right_again_behind_unpatch(family: str, broken: str) -> None:
    """Whatever was put in stays; nothing of ours is left, and merging off is the model as it is."""
    model, stock = patched(family), tiny_model(family)
    inputs = single(model, IMAGE)
    breaks, _ = BROKEN[broken]
    breaks(model)
    if "class" not in broken:
        breaks(stock)
    with merging(model, False), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, **CLOSE)
    unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert session_of(model) is None
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_missed_merge_the_next_call_is_right(family: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGE)
    expected = forward(model, inputs)
    layer = vision_layers(model)[1]
    bypass(layer)
    with pytest.raises(PatchStateError):
        forward(model, inputs)
    del layer.forward
    assert_same(forward(model, inputs), expected)
    assert_same(generate(model, inputs), generate(patched(family), inputs))


@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_plan_nothing_may_be_missing(family: str, part: str) -> None:
    """Skipping a layer in which nothing merges is the user's own affair."""
    model, stock = patched(family), tiny_model(family)
    inputs = single(model, IMAGE)
    for each in (model, stock):
        swap_layer(each, vision_layers, 3) if part == "vision" else bypass(decoder_layers(each)[1].mlp)
    with torch.no_grad():
        found, expected = model(**inputs).logits, stock(**inputs).logits
        assert session_of(model).report.kept_fraction < 0.5
    assert_differ(found, expected)
