"""What merging changes in transformers' tests, and why; everything else has to come out as without the patch."""

from __future__ import annotations

from transformers_suite.modes import CLASSES

__all__ = ["DIFFERENT"]

_ATTENTIONS = (
    "asks for attention maps as long as the prompt in every layer; behind a merge they are as long as what is left"
)

#: Tests that fail with merging on, in every supported release that has them.
DIFFERENT: dict[str, str] = {f"{tests}::test_attention_outputs": _ATTENTIONS for tests in CLASSES}
