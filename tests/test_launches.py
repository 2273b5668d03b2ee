"""A launch budget: what a merging layer and a whole prefill tell a device to do, against stock.

Counted on a CPU whose tensors go the way of other devices: each operation that computes or copies is a launch. A
device that waits for its next launch wins nothing by having fewer tokens.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, family_of
from helpers import MERGING
from illava_hooks import Method, merging, patch
from illava_hooks.engine import attention_tap
from illava_hooks.merge import rules, scores
from launches import LaunchCounter
from tiny_models import Sample, inputs_for, tiny_model

#: Launches that a merging layer may add, whatever the number and the lengths of its segments.
BUDGET = 40
#: The layer in front of one that merges in the language model ranks for it.
RANKING = 14
METHODS = ("illava", "nearest", "fastv", "diverse", "tome")


class LayerCounter(LaunchCounter):
    """Launches by layer. Our own operators are counted and not computed: at these sizes blocks would take minutes."""

    def __init__(self, model: Any) -> None:
        super().__init__("cpu")
        self.layers: dict[tuple[str, int], Counter[str]] = {}
        self.handles: list[Any] = []
        stages = {
            "encoder": family_of(model).encoder_layers(model),
            "decoder": family_of(model).language(model).layers,
        }
        for stage, layers in stages.items():
            for index, layer in enumerate(layers):
                self.watch(layer, (stage, index))

    def watch(self, layer: nn.Module, name: tuple[str, int]) -> None:
        # Our own pre-hooks were there first; this one must run before them.
        def enter(*_: Any) -> None:
            self.before = self.launches.copy()

        def leave(*_: Any) -> None:
            self.layers[name] = self.launches - self.before

        self.handles.append(layer.register_forward_pre_hook(enter, prepend=True))
        self.handles.append(layer.register_forward_hook(leave))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.name.startswith("illava::"):
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.launches[func._schema.name] += self.own(func, args)
        if func._schema.name == "illava::closest_behind":
            return torch.zeros_like(args[4])
        if func._schema.name == "illava::match_behind":
            found = args[1].gather(1, args[2])
            match = torch.stack([found, found.gather(1, args[3][:, None] - 1).expand_as(found)])
            return match, torch.zeros(found.shape)
        rows = args[1] if func._schema.name == "illava::column_means" else args[0]
        return torch.zeros(args[0].shape[1], len(rows))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, scores and rules go the way of other devices."""
    go_as_on_a_device(monkeypatch)


def go_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until ``monkeypatch`` is undone."""
    for module in (scores, rules, attention_tap):
        monkeypatch.setattr(module, "takes", lambda device: True)


def counted(model: Any, inputs: dict[str, Tensor]) -> tuple[LayerCounter, LayerCounter]:
    """A merging prefill and stock's; tables that are made once are there already."""
    with torch.no_grad():
        with LayerCounter(model):  # with the same answers of our operators: who stays decides what is a table
            model(**inputs)
        with LayerCounter(model) as ours:
            model(**inputs)
        with merging(model, False), LayerCounter(model) as stock:
            model(**inputs)
    return ours, stock


def added(ours: LayerCounter, stock: LayerCounter) -> dict[tuple[str, int], int]:
    """Launches that each layer adds, but for what stock's attention does for each segment."""
    return {name: ours.layers[name].total() - stock.layers[name].total() for name in stock.layers}


ONE = ((64, 64),)
MANY = {"one": ONE, "five": ONE * 5, "twelve": ONE * 12, "ragged": ((64, 64), (48, 30), (100, 100))}


def assert_budget(more: dict[tuple[str, int], int]) -> None:
    for (stage, index), launches in more.items():
        if index in MERGING["vit_layers" if stage == "encoder" else "llm_layers"]:
            assert 0 < launches <= BUDGET, (stage, index, launches)
        elif stage == "decoder" and index + 1 in MERGING["llm_layers"]:
            assert launches <= RANKING, (stage, index, launches)
        else:
            assert launches <= 8, (stage, index, launches)


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merging_layer_has_a_budget(family: str, method: str, kind: str) -> None:
    model = tiny_model(family)
    patch(model, **MERGING, method=method)
    assert_budget(added(*counted(model, inputs_for(model, [Sample(1, images=MANY[kind])]))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_has_in_bfloat16(family: str, method: str) -> None:
    """Sums in float32 are cast back there; a batch of unequal prompts has padding."""
    model = tiny_model(family).to(torch.bfloat16)
    patch(model, **MERGING, method=method)
    inputs = inputs_for(model, [Sample(1, images=MANY["ragged"]), Sample(2, images=ONE, text=(3, 4))])
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    assert_budget(added(*counted(model, inputs)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_and_tokens_do_not_count(family: str, method: str) -> None:
    model = tiny_model(family)
    patch(model, **MERGING, method=method)
    known, found = family_of(model), []
    # Of the others stock's attention does something for each window, and some windows are empty behind a merge.
    counting = {"encoder": known.merging_layers, "decoder": known.attending(model)}
    for images in (ONE * 2, ONE * 3, ONE * 12, ((128, 128),) * 2):
        more = added(*counted(model, inputs_for(model, [Sample(1, images=images)])))
        # Of a layer that carries a state along stock loops over chunks of tokens: where some are merged, less often.
        found.append(
            {(stage, layer): launches for (stage, layer), launches in more.items() if layer in counting[stage]}
        )
    assert found[1:] == found[:-1], found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counter_counts(family: str) -> None:
    """The tests above could fail: a layer that does more is seen, and a kernel counts as its launches."""
    model = tiny_model(family)
    patch(model, **MERGING)
    inputs = inputs_for(model, [Sample(1, images=ONE)])
    layer = family_of(model).encoder_layers(model)[1]
    before = added(*counted(model, inputs))
    handle = layer.register_forward_hook(lambda module, args, out: None if not torch.is_tensor(out) else out + 0)
    ours, _ = counted(model, inputs)
    handle.remove()
    assert ours.launches["illava::column_means"] == len(MERGING["vit_layers"])
    assert before["encoder", 1] > 20 and ours.launches["aten::add"] > 0


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_kernel_makes_an_lse_that_the_attention_gave(family: str, back_end: str) -> None:
    """One attention in a merging layer: only where a back-end keeps its LSE to itself a kernel runs for it."""
    model = tiny_model(family, attn_implementation=back_end)
    inputs = inputs_for(model, [Sample(2, images=MANY["ragged"])])
    merges = len(MERGING["vit_layers"])
    for score, kernel, launches in (("received_attention", "column_means", 1), ("query_lse", "row_lse", 0)):
        patch(model, **MERGING, method=Method("own", encoder_score=score))
        ours, _ = counted(model, inputs)
        assert ours.launches[f"illava::{kernel}"] == merges * (launches + (back_end == "eager"))


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_look_at_places_launch_no_score(family: str) -> None:
    """In the encoder no kernel of a score, in the language model nothing at all in front of a merge."""
    model = tiny_model(family)
    inputs = inputs_for(model, [Sample(1, images=ONE)])
    for method in ("diverse", "novel", "novel-agnostic"):
        patch(model, **MERGING, method=method)
        ours, stock = counted(model, inputs)
        kernels = ours.launches["illava::column_means"] + ours.launches["illava::row_lse"]
        assert (kernels > 0) == (method == "diverse")
        ranking = [added(ours, stock)["decoder", layer - 1] for layer in MERGING["llm_layers"]]
        assert any(launches > 0 for launches in ranking) == (method != "novel-agnostic")
