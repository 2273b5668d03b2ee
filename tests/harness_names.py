"""What lmms-eval 0.7.3 and VLMEvalKit 0.0.20 call the families without an embedded model, read in their registries.

`tests/integrations/test_names.py` compares this with the harnesses themselves. What they have under a name of these
families, but as code of its own (InternVL's remote code, LLaVA-1.5's first repository), is no model of transformers.
"""

#: Model classes of lmms-eval: modules below `lmms_eval.models`, and the class that is called the same in each.
LMMS_EVAL: dict[str, dict[str, str]] = {
    "gemma3": {"simple.gemma3": "Gemma3"},
    "gemma4": {"simple.gemma4": "Gemma4"},
    "glm4v": {"simple.glm4v": "GLM4V"},
    "internvl": {"chat.internvl_hf": "InternVLHf"},
    "llava": {"simple.llava_hf": "LlavaHf", "chat.llava_hf": "LlavaHf"},
    "llava_next": {"simple.llava_hf": "LlavaHf", "chat.llava_hf": "LlavaHf"},
    "qwen2_5_vl": {"simple.qwen2_5_vl": "Qwen2_5_VL", "chat.qwen2_5_vl": "Qwen2_5_VL"},
    "qwen3_5": {"simple.qwen3_5": "Qwen3_5", "chat.qwen3_5": "Qwen3_5"},
    "qwen3_vl": {"simple.qwen3_vl": "Qwen3_VL", "chat.qwen3_vl": "Qwen3_VL"},
}
#: Entries of VLMEvalKit's `supported_VLM` that get a merged twin, the one first that lends its arguments.
VLMEVALKIT: dict[str, tuple[str, ...]] = {
    "gemma3": ("Gemma3-4B", "Gemma3-12B", "Gemma3-27B"),
    "gemma4": ("Gemma4-E4B-it", "Gemma4-E2B-it", "Gemma4-31B-it", "Gemma4-26B-A4B-it"),
    "glm4v": ("GLM4_1VThinking-9b",),
    "llava_next": ("llava_next_vicuna_7b", "llava_next_mistral_7b"),
    "qwen2_5_vl": ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct"),
    "qwen3_5": ("Qwen3.5-27B", "Qwen3.5-35B-A3B"),
    "qwen3_vl": (
        "Qwen3-VL-8B-Instruct",
        "Qwen3-VL-4B-Instruct",
        "Qwen3-VL-2B-Instruct",
        "Qwen3-VL-30B-A3B-Instruct",
    ),
    "smolvlm": ("SmolVLM2", "SmolVLM2-500M", "SmolVLM2-256M"),
}
#: Those of them that run another engine where nothing is said.
OTHER_ENGINE = VLMEVALKIT["qwen3_vl"] + VLMEVALKIT["qwen3_5"]
