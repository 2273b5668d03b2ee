"""Chooses method, layers, split and amounts from pictures alone: successive halving against the unpatched model."""

from illava_hooks.tools.tune.front import plot_front, print_tuning, write_front
from illava_hooks.tools.tune.result import Point, Tuning
from illava_hooks.tools.tune.run import tune

__all__ = ["Point", "Tuning", "plot_front", "print_tuning", "tune", "write_front"]
