"""Measures what merging saves: speed, memory and the cost of merging itself."""

from illava_hooks.tools.bench.comparison import (
    SWEEPS,
    Comparison,
    compare,
    compare_fresh,
    flops_fit,
    measure_once,
    sweep,
)
from illava_hooks.tools.bench.measure import Measurement, Stage, measure, measure_alternating
from illava_hooks.tools.bench.overhead import MergeCost, merge_cost
from illava_hooks.tools.bench.plot import plot_comparisons
from illava_hooks.tools.bench.shapes import SHAPES, build_shape
from illava_hooks.tools.bench.table import as_dict, print_sweep, print_table, verdict
from illava_hooks.tools.bench.workload import Workload, build_workload

__all__ = [
    "SHAPES",
    "SWEEPS",
    "Comparison",
    "Measurement",
    "MergeCost",
    "Stage",
    "Workload",
    "as_dict",
    "build_shape",
    "build_workload",
    "compare",
    "compare_fresh",
    "flops_fit",
    "measure",
    "measure_alternating",
    "measure_once",
    "merge_cost",
    "plot_comparisons",
    "print_sweep",
    "print_table",
    "sweep",
    "verdict",
]
