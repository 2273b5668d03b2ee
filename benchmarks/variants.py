"""Named methods without one of their parts, for ``illava-hooks evaluate --methods benchmarks/variants.py:NAME``."""

from __future__ import annotations

from dataclasses import replace

from illava_hooks import METHODS

# Encoder layers do not weigh tokens by how many they stand for (proportional attention).
without_sizes = replace(METHODS["novel-agnostic"], name="novel-agnostic, no sizes", proportional=False)
selective_without_sizes = replace(METHODS["selective"], name="selective, no sizes", proportional=False)
