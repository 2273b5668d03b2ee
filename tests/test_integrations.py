"""What adapters make of a harness's arguments, without any harness."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from families import families, family_of
from harness_names import LMMS_EVAL
from helpers import assert_says
from illava_hooks import MergeConfigError, UnsupportedModelError, patch, session_of, tiny
from illava_hooks.errors import InputError
from illava_hooks.integrations.arguments import split_arguments

EMBEDDED = families(embedded=True)
#: How lmms-eval calls the families that it has.
HARNESSES = {name: harness for name in EMBEDDED if (harness := family_of(name).lmms_eval) is not None}
ON_ONE_DEVICE = [name for name, harness in HARNESSES.items() if harness.names_device]
OFF = {"vit_layers": [], "vit_r": 0, "llm_layers": [], "llm_ratio": 1.0}
PUBLISHED = {
    "enable_illava_vit": True,
    "illava_vit_k": "5-6-7-8",
    "illava_vit_r": 92,
    "enable_illava_llm": True,
    "illava_llm_k": 8,
    "illava_llm_r": 0.7,
}


class TestArguments:
    """As a harness hands them over: numbers as numbers, `5-6` as text."""

    def test_our_names(self) -> None:
        given = {"pretrained": "x", "vit_layers": "12-13", "vit_r": 0.16, "llm_layers": 8, "method": "nearest"}
        settings, left = split_arguments({**given, "batch_size": 2})
        assert settings == {"vit_layers": [12, 13], "vit_r": 0.16, "llm_layers": [8], "method": "nearest"}
        assert left == {"pretrained": "x", "batch_size": 2}
        assert split_arguments(given)[0] == settings and given["llm_layers"] == 8, "what is given stays as it is"

    def test_nothing_given_leaves_everything_to_the_preset(self) -> None:
        assert split_arguments({"pretrained": "x"}) == ({}, {"pretrained": "x"})

    @pytest.mark.parametrize(("text", "layers"), [("", []), ("7", [7]), (7, [7]), ([5, 6], [5, 6]), ((5,), (5,))])
    def test_spellings_of_layers(self, text: Any, layers: Any) -> None:
        assert split_arguments({"vit_layers": text})[0]["vit_layers"] == layers

    @pytest.mark.parametrize(("text", "number"), [("92", 92), ("0.16", 0.16), (92, 92), (0.16, 0.16)])
    def test_spellings_of_amounts(self, text: Any, number: float) -> None:
        found = split_arguments({"vit_r": text})[0]["vit_r"]
        assert found == number and type(found) is type(number)

    def test_published_names(self) -> None:
        ours = {"vit_layers": [5, 6, 7, 8], "vit_r": 92, "llm_layers": [8], "llm_ratio": 0.7}
        assert split_arguments({**PUBLISHED, "pretrained": "x"}) == (ours, {"pretrained": "x"})
        named = {name: str(value) for name, value in PUBLISHED.items()}
        assert split_arguments({**named, "method": "tome"})[0] == {**ours, "method": "tome"}

    @pytest.mark.parametrize("no", [False, "False", "false"])
    def test_a_stage_that_is_not_switched_on_merges_nothing(self, no: Any) -> None:
        only_vit = {name: value for name, value in PUBLISHED.items() if "vit" in name}
        expected = {**OFF, "vit_layers": [5, 6, 7, 8], "vit_r": 92}
        assert split_arguments(only_vit)[0] == expected
        assert split_arguments({**PUBLISHED, "enable_illava_llm": no})[0] == expected
        assert split_arguments({"enable_illava_vit": no})[0] == OFF
        model, _ = tiny.load(EMBEDDED[0])
        config = patch(model, **split_arguments({"enable_illava_vit": no})[0]).config
        assert config.image.is_identity and config.video.is_identity

    @pytest.mark.parametrize(
        ("given", "parts"),
        [
            ({"vit_layers": "5+6"}, ["vit_layers", r"'5\+6'", "5-6-7-8"]),
            ({"vit_layers": 5.5}, ["vit_layers", "5.5"]),
            ({"vit_r": "many"}, ["vit_r", "'many'", "0.16"]),
            ({"vit_r": 92, "illava_llm_k": "8"}, ["vit_r and illava_llm_k are both given"]),
            ({"illava_vit_k": "5-6"}, ["illava_vit_k is given without enable_illava_vit", "=True", "False"]),
            ({"enable_illava_llm": True, "illava_llm_k": 8}, ["illava_llm_r is not given"]),
            ({"enable_illava_vit": "perhaps"}, ["enable_illava_vit", "'perhaps'", "True or False"]),
        ],
    )
    def test_what_cannot_be_meant_is_told_in_one_line(self, given: dict[str, Any], parts: list[str]) -> None:
        with pytest.raises((MergeConfigError, InputError)) as caught:
            split_arguments(given)
        assert_says(caught.value, *parts)


class Harness:
    """A model class such as the harness has: it takes its own arguments only, and loads a model."""

    def __init__(self, pretrained: str, device: str = "cuda", device_map: str = "") -> None:
        self.given = {"device": device, "device_map": device_map}
        self.model: Any = tiny.load(pretrained)[0] if pretrained in EMBEDDED else torch.nn.Linear(1, 1)


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our module for lmms-eval, over stand-ins for what it takes from there."""

    def module(name: str, **contents: Any) -> None:
        stand_in = ModuleType(name)
        vars(stand_in).update(contents)
        monkeypatch.setitem(sys.modules, name, stand_in)

    ours = "illava_hooks.integrations.lmms_eval.models"
    for parent in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.chat", "lmms_eval.models.simple"):
        module(parent)
    for models in (*(harness.models for harness in HARNESSES.values()), *LMMS_EVAL.values()):
        for place, name in models.items():
            module(f"lmms_eval.models.{place}", **{name: type(f"{place}.{name}", (Harness,), {})})
    module("lmms_eval.models.registry_v2", ModelManifest=lambda name, **paths: (name, paths))
    told: list[str] = []
    module("loguru", logger=type("Logger", (), {"info": staticmethod(told.append)}), told=told)
    monkeypatch.delitem(sys.modules, ours, raising=False)
    yield importlib.import_module(ours)
    sys.modules.pop(ours, None)


class TestLmmsEval:
    """The adapter over stand-ins; `tests/integrations/test_lmms_eval.py` runs the harness itself."""

    def test_manifests_lead_to_classes(self, lmms_eval: Any) -> None:
        from illava_hooks.integrations.lmms_eval import manifests

        found = dict(manifests())
        known = {name: harness.models for name, harness in HARNESSES.items()} | LMMS_EVAL
        assert set(found) == {f"{name}_illava" for name in known}
        for family, models in known.items():
            paths = found[f"{family}_illava"]
            stock = set()
            for kind, path in paths.items():
                module, _, name = path.rpartition(".")
                made = getattr(lmms_eval, name)
                assert module == lmms_eval.__name__ and issubclass(made, Harness)
                stock.add(made.__bases__[-1].__name__)
                assert made.__bases__[-1].__name__.startswith(kind.removesuffix("_class_path"))
            assert stock == {f"{place}.{name}" for place, name in models.items()}

    @pytest.mark.parametrize(
        ("name", "family"), [(name, family) for family, harness in HARNESSES.items() for name in harness.ours]
    )
    def test_the_loaded_model_is_patched(self, lmms_eval: Any, name: str, family: str) -> None:
        made = getattr(lmms_eval, name)(pretrained=family, device="cpu", vit_layers="3-4", vit_r=0.25, llm_ratio=1.0)
        session = session_of(made.model)
        assert session is not None
        assert session.config == patch(tiny.load(family)[0], [3, 4], 0.25, llm_ratio=1.0).config
        assert len(sys.modules["loguru"].told) == 1 and "(3, 4)" in sys.modules["loguru"].told[0]
        # The harness's default of some classes, an empty text, is no device map for transformers any more.
        assert made.given == {"device": "cpu", "device_map": "cpu" if HARNESSES[family].names_device else ""}

    @pytest.mark.parametrize("family", ON_ONE_DEVICE)
    def test_a_device_map_that_is_given_stays(self, lmms_eval: Any, family: str) -> None:
        made = getattr(lmms_eval, HARNESSES[family].ours[0])(pretrained=family, device_map="auto")
        assert made.given == {"device": "cuda", "device_map": "auto"}

    @pytest.mark.parametrize("family", ON_ONE_DEVICE)
    def test_several_processes_spread_as_the_harness_does(
        self, lmms_eval: Any, monkeypatch: pytest.MonkeyPatch, family: str
    ) -> None:
        monkeypatch.setattr(lmms_eval, "PartialState", lambda: type("State", (), {"num_processes": 2}))
        made = getattr(lmms_eval, HARNESSES[family].ours[0])(pretrained=family)
        assert made.given["device_map"] == ""

    @pytest.mark.parametrize("family", HARNESSES)
    def test_wrong_settings_are_refused(self, lmms_eval: Any, family: str) -> None:
        ours = getattr(lmms_eval, HARNESSES[family].ours[0])
        with pytest.raises(MergeConfigError) as caught:
            ours(pretrained=family, llm_layers="0-1")
        assert_says(caught.value, "llm_layers contains 0", "1..5")
        with pytest.raises(UnsupportedModelError):
            ours(pretrained="another")
