"""vLLM's CPU runner never opens the way by which positions follow pictures; its GPU runner does when it loads."""

from __future__ import annotations

from typing import Any

__all__ = ["open_positions"]


def open_positions() -> None:
    """Makes the CPU runner of this process look, before it gathers embeddings, whether its model merges."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner._gather_mm_embeddings
    if getattr(stock, "illava", False):
        return

    def gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.model_executor.models.interfaces import supports_multimodal_pruning

        config = self.model_config.multimodal_config
        merges = supports_multimodal_pruning(self.get_model()) and config.is_multimodal_pruning_enabled()
        self.is_multimodal_pruning_enabled = bool(merges)
        return stock(self, *args, **kwargs)

    gather.illava = True  # type: ignore[attr-defined]
    CPUModelRunner._gather_mm_embeddings = gather
