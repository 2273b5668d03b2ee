"""transformers' ModelTesterMixin on both families, patched or not as ``HF_SUITE_MODE`` says; see ``run.py``."""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import signature
from typing import Any

import pytest
from transformers import LlavaOnevisionModel

from illava_hooks import MergeSession
from transformers_suite.modes import MODES, merged, patch_when_constructed
from transformers_suite.sdist import PACKAGE
from transformers_suite.testers import LlavaOnevisionTester, Qwen2VLTester, Tester

common: Any = import_module(f"{PACKAGE}.test_modeling_common")
SESSIONS: list[MergeSession] = []

if (settings := MODES[os.environ["HF_SUITE_MODE"]]) is not None:
    for family, tester in (("llava_onevision", LlavaOnevisionTester), ("qwen2_vl", Qwen2VLTester)):
        for model_class in tester.model_classes:
            patch_when_constructed(model_class, settings[family], SESSIONS)


class Suite(common.ModelTesterMixin, common.GenerationTesterMixin):  # type: ignore[misc]
    """What the two families share."""

    tester: type[Tester]
    _is_composite = True

    def setUp(self) -> None:
        """The same random inputs and weights in every run."""
        common.global_rng.seed(0)
        common.set_seed(0)
        self.model_tester = self.tester()

    def check_training_gradient_checkpointing(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Images and videos apart: the test's mock replays only the last call of a layer that runs twice."""
        for modality in ("image", "video"):
            self.model_tester.modalities = (modality,)
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    @pytest.fixture(autouse=True)
    def count(self, record_property: Callable[[str, object], None]) -> Iterator[None]:
        """Notes how many models were patched, and how many of them merged."""
        SESSIONS.clear()
        yield
        record_property("patched", len(SESSIONS))
        record_property("merged", sum(map(merged, SESSIONS)))


class LlavaOnevision(Suite, unittest.TestCase):
    """LLaVA-OneVision."""

    tester = LlavaOnevisionTester
    all_model_classes = tester.model_classes
    skip_test_image_features_output_shape = True  # its rows are tiles and frames, not images and videos
    skip_test_video_features_output_shape = True
    test_all_params_have_gradient = False  # the tower's last norm stands behind the chosen features
    additional_model_inputs = ["pixel_values", "image_sizes", "pixel_values_videos"]

    def _video_features_prepare_config_and_inputs(self) -> Any:
        config, inputs = super()._video_features_prepare_config_and_inputs()
        if "pixel_values_videos" not in signature(LlavaOnevisionModel.get_video_features).parameters:  # up to 5.17
            inputs["pixel_values"] = inputs.pop("pixel_values_videos")
        return config, inputs


class Qwen2VL(Suite, unittest.TestCase):
    """Qwen2-VL: patches of all rows are packed into one."""

    tester = Qwen2VLTester
    all_model_classes = tester.model_classes
    additional_model_inputs = [
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "mm_token_type_ids",
    ]

    def _prepare_for_class(self, inputs_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _packed(super()._prepare_for_class(inputs_dict, *args, **kwargs))

    def _image_features_prepare_config_and_inputs(self) -> Any:
        config, inputs = super()._image_features_prepare_config_and_inputs()
        return config, _packed(inputs)

    def _video_features_prepare_config_and_inputs(self) -> Any:
        config, inputs = super()._video_features_prepare_config_and_inputs()
        return config, _packed(inputs)


def _packed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Patches as the processor gives them."""
    return {
        name: value.flatten(0, 1) if name.startswith("pixel_values") and value.dim() == 3 else value
        for name, value in inputs.items()
    }
