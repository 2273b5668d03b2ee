"""Which classes merge inside vLLM."""

from __future__ import annotations

__all__ = ["BACKEND", "BACKEND_FAMILIES", "BACKEND_SINCE", "MODELS"]

#: By vLLM's name of an architecture, the class that stands in for vLLM's own: named by strings, so that none is
#: imported before its model is served.
MODELS = {
    "Qwen2VLForConditionalGeneration": "illava_hooks.integrations.vllm.qwen2_vl:MergingQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "illava_hooks.integrations.vllm.qwen2_5_vl:MergingQwen25VL",
    "Qwen3VLForConditionalGeneration": "illava_hooks.integrations.vllm.qwen3_vl:MergingQwen3VL",
}

#: Likewise vLLM's wrapper around models of transformers, which ``--model-impl transformers`` asks for.
BACKEND = {
    "TransformersMultiModalForCausalLM": "illava_hooks.integrations.vllm.transformers_backend:MergingTransformers",
}

#: Families that merge in it.
BACKEND_FAMILIES = ("llava_onevision",)

#: The first version of vLLM whose wrapper is known.
BACKEND_SINCE = (0, 32)
