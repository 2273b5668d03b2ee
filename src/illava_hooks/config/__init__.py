"""Where and how much a modality merges, validated against a model's limits."""

from illava_hooks.config.schedule import MergeSchedule, Modality, llm_removed, split_keep
from illava_hooks.config.settings import MergeConfig, ModelLimits

__all__ = ["MergeConfig", "MergeSchedule", "Modality", "ModelLimits", "llm_removed", "split_keep"]
