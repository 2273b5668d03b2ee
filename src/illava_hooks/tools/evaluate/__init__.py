"""Measures what merging costs: accuracy, loyalty and divergence at equal budgets."""

from illava_hooks.tools.evaluate.budgets import CONTROLS, STAGES, budget_settings, downsampled
from illava_hooks.tools.evaluate.front import FRACTIONS, default_methods, evaluate, print_rows
from illava_hooks.tools.evaluate.matching import MATCHES
from illava_hooks.tools.evaluate.rows import Row, read_header, read_rows
from illava_hooks.tools.evaluate.run import Outcome, accuracy, predict, run_items
from illava_hooks.tools.evaluate.statistics import interval, paired_interval
from illava_hooks.tools.evaluate.sweep import sweep

__all__ = [
    "CONTROLS",
    "FRACTIONS",
    "MATCHES",
    "STAGES",
    "Outcome",
    "Row",
    "accuracy",
    "budget_settings",
    "default_methods",
    "downsampled",
    "evaluate",
    "interval",
    "paired_interval",
    "predict",
    "print_rows",
    "read_header",
    "read_rows",
    "run_items",
    "sweep",
]
