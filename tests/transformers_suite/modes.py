"""How the models of a run are patched: the moment that one is constructed, whoever constructs it."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any

from families import FAMILIES, Family, Suite, _gemma3, _gemma4, family
from illava_hooks import MergeSession, patch

__all__ = [
    "ABSENT",
    "CLASSES",
    "IN_HALF",
    "LEFT_OUT",
    "MODES",
    "SAMPLED",
    "SAMPLE_MODES",
    "in_sample",
    "merged",
    "patch_when_constructed",
]

#: What is tested, by the names of the test classes.
CLASSES: dict[str, tuple[Family, Suite]] = {
    name: (known, suite)
    for known in (*map(family, FAMILIES), _gemma3.FAMILY, _gemma4.FAMILY)
    for name, suite in vars(type(known)).get("suites", {}).items()  # a family's own, not those that it inherits
}

#: Those of families without an embedded model: unless ``--all`` is asked for, less is run on them.
SAMPLED = frozenset(name for name, (family, _) in CLASSES.items() if family.embedded is None)
SAMPLE_MODES = ("stock", "merging")
#: Left out of a sample: loading, which no hook sees, and most of the 24 settings in which back-ends are compared.
#: Of the other tests each model gets one of so many, each model others.
ONE_OF = 8
LEFT_OUT = re.compile(r"test_bc_torch_dtype|test_eager_matches_sdpa_inference_(?!09_|13_)|test_can_init_all_missing")

#: Compares attention back-ends in half precision: `alike` says what decides there.
IN_HALF = re.compile(r"test_eager_matches_sdpa_inference_\d+_b?fp?16")

#: What no model here has.
ABSENT = re.compile(r"test_get_audio_features")


def in_sample(name: str, test: str) -> bool:
    """Whether a test of a model is in the sample."""
    return not LEFT_OUT.match(test) and zlib.crc32(f"{name}::{test}".encode()) % ONE_OF == 0


def _layers(suite: Suite) -> dict[str, Any]:
    return {"vit_layers": list(suite.vit_layers), "llm_layers": list(suite.llm_layers)}


#: Settings of each run, as functions of a suite; None: the stock model.
MODES: dict[str, Callable[[Suite], dict[str, Any]] | None] = {
    "stock": None,
    # Nothing is to be removed: every hook is in place and steps aside.
    "identity": lambda suite: {**_layers(suite), "vit_r": 0, "llm_ratio": 1.0},
    # A share too small to remove a single token: the merging layers, the gathering and the scattering all run.
    "idle": lambda suite: {**_layers(suite), "vit_r": 1e-4, "llm_ratio": 0.9999},
    "merging": lambda suite: {**_layers(suite), "vit_r": suite.vit_r, "llm_ratio": 0.6},
}


def patch_when_constructed(
    model_class: Any, settings: Callable[[], dict[str, Any]], sessions: list[MergeSession]
) -> None:
    """Wraps a class's constructor for the life of the process.

    ``from_pretrained``, ``from_config`` and subclasses all come through it. A model with a head constructs the bare
    model inside: only the outermost one is patched.

    Args:
        model_class: the class.
        settings: gives the arguments of ``patch``.
        sessions: where the session of each patched model is put.
    """
    construct: Callable[..., None] = model_class.__init__

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = not _under_construction
        _under_construction.append(self)
        try:
            construct(self, *args, **kwargs)
        finally:
            _under_construction.pop()
        if outermost:
            sessions.append(patch(self, **settings()))

    model_class.__init__ = constructed


_under_construction: list[Any] = []


def merged(session: MergeSession) -> bool:
    """Whether a model ran a forward that removed tokens."""
    report = session.report
    if not report:
        return False
    return report.kept_fraction < 1 or report.encoder_flops[0] < report.encoder_flops[1]
