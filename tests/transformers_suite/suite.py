"""transformers' ModelTesterMixin on the families, patched or not as ``HF_SUITE_MODE`` says; see ``run.py``.

``HF_SUITE_MODELS`` names the models, where not all are tested; with ``HF_SUITE_SAMPLE``, a sample is run on some.
"""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

from families import Modality
from illava_hooks import MergeSession
from transformers_suite.alike import AlikeScores
from transformers_suite.modes import (
    ABSENT,
    CLASSES,
    IN_HALF,
    MODES,
    SAMPLED,
    in_sample,
    merged,
    patch_when_constructed,
)
from transformers_suite.sdist import PACKAGE
from transformers_suite.testers import Tester, packed

common: Any = import_module(f"{PACKAGE}.test_modeling_common")
SESSIONS: list[MergeSession] = []
METHOD: dict[str, Any] = {}  # of the test that runs


def new_tester(name: str) -> Tester:
    """A new one for a name in ``CLASSES``."""
    return Tester(*CLASSES[name])


def with_method(given: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Settings, with the method of the test that runs by then."""
    return lambda: {**given, **METHOD}


NAMES = os.environ["HF_SUITE_MODELS"].split() if "HF_SUITE_MODELS" in os.environ else list(CLASSES)
LESS = SAMPLED if "HF_SUITE_SAMPLE" in os.environ else frozenset()

if (settings := MODES[os.environ["HF_SUITE_MODE"]]) is not None:
    for name in NAMES:
        for model_class in new_tester(name).model_classes:
            patch_when_constructed(model_class, with_method(settings(CLASSES[name][1])), SESSIONS)


class Common(common.ModelTesterMixin, common.GenerationTesterMixin):
    """The tests of one model."""

    name: str
    model_tester: Tester
    _is_composite = True

    def setUp(self) -> None:
        """The same random inputs and weights in every run."""
        common.global_rng.seed(0)
        common.set_seed(0)
        self.model_tester = new_tester(self.name)

    def _prepare_for_class(self, inputs_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return packed(super()._prepare_for_class(inputs_dict, *args, **kwargs))

    def _image_features_prepare_config_and_inputs(self) -> Any:
        return self._features("image")

    def _video_features_prepare_config_and_inputs(self) -> Any:
        return self._features("video")

    def _features(self, modality: Modality) -> tuple[Any, dict[str, Any]]:
        """What a feature method takes, by its names in this release."""
        self.model_tester.modalities = (modality,)
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, self.model_tester.family.feature_arguments(packed(inputs))[modality]

    def check_training_gradient_checkpointing(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Images and videos apart: the test's mock replays only the last call of a layer that runs twice."""
        for modality in self.model_tester.family.modalities:
            self.model_tester.modalities = (modality,)
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    @pytest.fixture(autouse=True)
    def count(self, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[None]:
        """Chooses the method; notes how many models were patched, and how many of them merged."""
        METHOD["method"] = AlikeScores().method() if IN_HALF.match(request.node.name) else "illava"
        SESSIONS.clear()
        yield
        record_property("patched", len(SESSIONS))
        record_property("merged", sum(map(merged, SESSIONS)))


def class_of(name: str) -> type[Common]:
    """The tests of a model."""
    made, suite = new_tester(name), CLASSES[name][1]
    inputs = made.prepare_config_and_inputs_for_common()[1]
    own = {
        "__module__": __name__,
        "name": name,
        "all_model_classes": made.model_classes,
        "additional_model_inputs": [each for each in inputs if each not in ("input_ids", "attention_mask")],
        "skip_test_image_features_output_shape": not suite.rows_are_visuals,
        "skip_test_video_features_output_shape": not suite.rows_are_visuals,
        "test_all_params_have_gradient": suite.all_weights_train,
    }
    tests = [test for test in dir(Common) if test.startswith("test_")]
    left_out = [test for test in tests if ABSENT.match(test) or name in LESS and not in_sample(name, test)]
    return type(name, (Common, unittest.TestCase), {**own, **dict.fromkeys(left_out)})


globals().update({name: class_of(name) for name in NAMES})
