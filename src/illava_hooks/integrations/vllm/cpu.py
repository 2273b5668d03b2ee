"""Opens vLLM's way for positions that follow pictures; its CPU runner never looks whether it is open."""

from __future__ import annotations

from typing import Any

__all__ = ["let_positions_follow"]

#: The only switch of that way is a rate of video pruning; nothing is pruned by it.
BARELY = 1e-9


def let_positions_follow(vllm_config: Any) -> None:
    """Makes vLLM ask a model that supports it for positions again, with the embeddings of each chunk.

    Args:
        vllm_config: as it was given, while the model is made.
    """
    from vllm.platforms import current_platform

    vllm_config.model_config.multimodal_config.video_pruning_rate = BARELY
    if current_platform.is_cpu():
        _look_before_gathering()


def _look_before_gathering() -> None:
    """VLLM's GPU runner looks when it loads a model, its CPU runner has a loading of its own, which does not."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner._gather_mm_embeddings
    if getattr(stock, "illava", False):
        return

    def gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.model_executor.models.interfaces import supports_multimodal_pruning

        config = self.model_config.multimodal_config
        follows = supports_multimodal_pruning(self.get_model()) and config.is_multimodal_pruning_enabled()
        self.is_multimodal_pruning_enabled = bool(follows)
        return stock(self, *args, **kwargs)

    gather.illava = True  # type: ignore[attr-defined]
    CPUModelRunner._gather_mm_embeddings = gather
