"""Measures what merging costs: accuracy, loyalty and divergence at equal budgets."""

from illava_hooks.tools.evaluate.budgets import CONTROLS, STAGES, budget_settings, downsampled
from illava_hooks.tools.evaluate.run import Outcome, accuracy, predict, run_items
from illava_hooks.tools.evaluate.statistics import interval, paired_interval
from illava_hooks.tools.evaluate.sweep import Row, print_rows, read_rows, sweep

__all__ = [
    "CONTROLS",
    "STAGES",
    "Outcome",
    "Row",
    "accuracy",
    "budget_settings",
    "downsampled",
    "interval",
    "paired_interval",
    "predict",
    "print_rows",
    "read_rows",
    "run_items",
    "sweep",
]
