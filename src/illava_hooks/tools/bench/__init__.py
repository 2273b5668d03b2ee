"""Measures what merging saves: speed, memory and the cost of merging itself."""

from illava_hooks.tools.bench.measure import Measurement, measure, measure_alternating
from illava_hooks.tools.bench.shapes import SHAPES, build_shape
from illava_hooks.tools.bench.table import as_dict, print_table, verdict
from illava_hooks.tools.bench.workload import Workload, build_workload

__all__ = [
    "SHAPES",
    "Measurement",
    "Workload",
    "as_dict",
    "build_shape",
    "build_workload",
    "measure",
    "measure_alternating",
    "print_table",
    "verdict",
]
