"""Which classes merge inside vLLM."""

from __future__ import annotations

__all__ = ["MODELS"]

#: By vLLM's name of an architecture, the class that stands in for vLLM's own: named by strings, so that none is
#: imported before its model is served.
MODELS = {
    "Qwen2VLForConditionalGeneration": "illava_hooks.integrations.vllm.qwen2_vl:MergingQwen2VL",
}
