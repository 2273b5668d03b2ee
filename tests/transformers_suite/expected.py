"""What merging changes in transformers' tests, and why; everything else has to come out as without the patch."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from transformers_suite.modes import CLASSES

__all__ = ["DIFFERENT", "UNPATCHED"]

_ATTENTIONS = (
    "asks for attention maps as long as the prompt in every layer; behind a merge they are as long as what is left"
)

_BALANCING = "asks for the balancing loss over experts, which needs every token; refused with an error"

#: The second came behind 5.15; releases between that and 5.24 were not run.
_BALANCED: tuple[str, ...] = ("test_capture_outputs_decorator", "test_output_router_logits_from_config")
if Version(version("transformers")) < Version("5.24"):
    _BALANCED = _BALANCED[:1]

#: Tests that fail with merging on, in every supported release that has them.
DIFFERENT: dict[str, str] = {
    f"{name}::{test}": reason
    for name, (_, suite) in CLASSES.items()
    for test, reason in {
        "test_attention_outputs": _ATTENTIONS,
        **(dict.fromkeys(_BALANCED, _BALANCING) if name.endswith("Moe") else {}),
    }.items()
    if suite.llm_layers
}

#: Why tests fail without the patch.
UNPATCHED: dict[str, str] = {
    f"{name}::{test}": reason for name, (_, suite) in CLASSES.items() for test, reason in suite.unpatched.items()
}
