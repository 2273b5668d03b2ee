"""What vLLM is asked beside the settings, and what of it does not go with merging: refused before a worker starts."""

from __future__ import annotations

from typing import Any

from illava_hooks.engine.family import Family
from illava_hooks.errors import IllavaHooksError, UnsupportedModelError
from illava_hooks.integrations.vllm.models import BACKEND, BACKEND_FAMILIES, MODELS
from illava_hooks.integrations.vllm.settings import KEY, settings_of
from illava_hooks.methods import Method

__all__ = ["check_method", "settle"]


def settle(vllm_config: Any, backend: bool) -> None:
    """Checks everything, and writes the settings down as they came out: every process reads the same ones.

    Args:
        vllm_config: vLLM's whole configuration.
        backend: whether the plugin knows the Transformers back-end of this vLLM.

    Raises:
        UnsupportedModelError: in one line, what cannot be.
    """
    model = vllm_config.model_config
    try:
        settings = settings_of(model.hf_config)
        assert settings is not None
        check_architecture(model.architecture, settings.family, backend)
        check_method(settings.config.method)
        check_engine(vllm_config)
    except IllavaHooksError as error:
        # A ValueError would come out of vLLM's own checks as a page of pydantic's.
        raise UnsupportedModelError(f"{KEY}: {error}") from error
    setattr(model.hf_config, KEY, settings.config.to_entry())
    if model.architecture in BACKEND:
        _carry_positions(model.hf_config.get_text_config())


def check_architecture(architecture: str, family: Family, backend: bool) -> None:
    """Refuses a class of vLLM's that would serve the model without merging."""
    name = family.title or family.name
    if architecture in MODELS or (architecture in BACKEND and family.name in BACKEND_FAMILIES):
        return
    if architecture in BACKEND:
        raise UnsupportedModelError(
            f"{name} cannot merge on vLLM's Transformers back-end yet, where the plugin knows "
            f"{list(BACKEND_FAMILIES)}; leave the settings out, or serve one of {[*MODELS]} by vLLM's own class"
        )
    cure = "leave the settings out, or run patch(model, ...) by Ray Data or torchrun, see docs/distributed.md"
    if backend and family.name in BACKEND_FAMILIES:
        cure = "use --model-impl transformers"
    raise UnsupportedModelError(
        f"vLLM serves {name} by its own {architecture}, in which nothing can merge yet; {cure}"
    )


def _carry_positions(text: Any) -> None:
    """Turns vLLM's way for M-RoPE on for a model with plain positions: no other way follows pictures.

    Args:
        text: the configuration of the decoder, whose own code does not read sections.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [head // 2, 0, 0]}


def check_method(method: Method) -> None:
    """Refuses methods that need what a serving engine does not give."""
    if method.is_published or method.layout != "aligned":
        raise UnsupportedModelError(
            f"method {method.name!r} lays survivors out as published code does, which vLLM cannot; use another"
        )
    if method.encoder_score == "random":
        raise UnsupportedModelError(
            f"method {method.name!r} draws lots, and ranks and caches of a server must agree; use another"
        )
    if method.proportional:
        raise UnsupportedModelError(
            f"method {method.name!r} weighs merged tokens by a bias in the encoder's attention, and vLLM's takes "
            "none; use one that is not proportional, such as {'encoder_score': 'uniform', 'merge': 'diverse'}"
        )


def check_engine(vllm_config: Any) -> None:
    """Refuses what vLLM can do otherwise, and not while positions depend on pictures."""
    parallel, multimodal = vllm_config.parallel_config, vllm_config.model_config.multimodal_config
    if parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: vLLM tells positions of survivors to the "
            "first stage only; use 1, and tensor_parallel_size"
        )
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise UnsupportedModelError(
            "enable_tower_connector_lora is True: LoRA on the vision encoder counts tokens that are merged; use False"
        )
    if vllm_config.compilation_config.compile_mm_encoder:
        raise UnsupportedModelError(
            "compile_mm_encoder is True: blocks that are compiled ahead cannot merge; use False"
        )
    if vllm_config.speculative_config is not None:
        raise UnsupportedModelError(
            "speculative decoding is on: a draft model is not told where survivors stand; serve without it"
        )
    if getattr(multimodal, "enable_mm_embeds", False):
        raise UnsupportedModelError("enable_mm_embeds is True: ready-made embeddings are not merged; use False")
    if getattr(multimodal, "video_pruning_rate", None):
        raise UnsupportedModelError(
            f"video_pruning_rate is {multimodal.video_pruning_rate}: vLLM's own pruning and merging exclude each "
            "other; use one of them"
        )
