"""transformers' ModelTesterMixin on the families, patched or not as ``HF_SUITE_MODE`` says; see ``run.py``."""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

from families import family_of
from illava_hooks import MergeSession
from transformers_suite.modes import CLASSES, MODES, merged, patch_when_constructed
from transformers_suite.sdist import PACKAGE
from transformers_suite.testers import Tester

common: Any = import_module(f"{PACKAGE}.test_modeling_common")
SESSIONS: list[MergeSession] = []

if (settings := MODES[os.environ["HF_SUITE_MODE"]]) is not None:
    for family in CLASSES:
        for model_class in family_of(family).suite()[0].model_classes:
            patch_when_constructed(model_class, settings(family_of(family)), SESSIONS)


class Suite(common.ModelTesterMixin, common.GenerationTesterMixin):  # type: ignore[misc]
    """What the families share."""

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
        for modality in self.tester.modalities:
            self.model_tester.modalities = (modality,)
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    @pytest.fixture(autouse=True)
    def count(self, record_property: Callable[[str, object], None]) -> Iterator[None]:
        """Notes how many models were patched, and how many of them merged."""
        SESSIONS.clear()
        yield
        record_property("patched", len(SESSIONS))
        record_property("merged", sum(map(merged, SESSIONS)))


def class_of(family: str) -> type[Suite]:
    """The tests of a family."""
    tester, tests = family_of(family).suite()
    own = {"tester": tester, "all_model_classes": tester.model_classes, "__module__": __name__}
    return type(CLASSES[family], (tests, Suite, unittest.TestCase), own)


globals().update({CLASSES[family]: class_of(family) for family in CLASSES})
