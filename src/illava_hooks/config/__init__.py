"""Where and how much a modality merges, validated against a model's limits."""

from illava_hooks.config.schedule import MergeSchedule, Modality, describe, llm_removed, split_keep
from illava_hooks.config.settings import MergeConfig, ModelLimits, check_preset

__all__ = [
    "MergeConfig",
    "MergeSchedule",
    "Modality",
    "ModelLimits",
    "check_preset",
    "describe",
    "llm_removed",
    "split_keep",
]
