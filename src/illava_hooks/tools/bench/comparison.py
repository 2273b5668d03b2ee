"""A workload without and with merging: in one process, in fresh ones, and over sweeps of sizes or methods."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from illava_hooks.api import patch, unpatch
from illava_hooks.engine.report import MergeReport, VisualReport
from illava_hooks.errors import InputError
from illava_hooks.methods import METHODS, Method
from illava_hooks.tools.bench.measure import Measurement, Stage, measure, measure_alternating
from illava_hooks.tools.bench.overhead import MergeCost, merge_cost
from illava_hooks.tools.bench.workload import Workload, build_workload
from illava_hooks.tools.progress import SILENT, Progress

__all__ = ["SWEEPS", "Comparison", "compare", "compare_fresh", "flops_fit", "measure_once", "sweep"]

#: What a sweep goes through, by name.
SWEEPS: dict[str, tuple[int | str, ...]] = {
    "tiles": (2, 3, 5, 7, 10),
    "frames": (4, 8, 16, 32, 64),
    "patches": (256, 1024, 2048, 4096, 8192),
    "new": (1, 8, 32, 128),
    "methods": tuple(METHODS),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload.

    Attributes:
        label: what distinguishes it in a sweep.
        plain: runs without merging.
        merged: runs with it.
        cost: what the merged ones do, and what merging itself takes.
    """

    label: str
    plain: list[Measurement]
    merged: list[Measurement]
    cost: MergeCost

    @property
    def report(self) -> MergeReport:
        """What the merged runs merged; they all do the same."""
        return self.cost.report

    @property
    def ideal(self) -> float:
        """The share of the unpatched prefill that the FLOPs allow.

        Where the language model is left alone its FLOPs are not counted: then it is the time of each stage that the
        FLOPs of the encoder shorten.
        """
        report = self.report
        if report.llm_flops[1]:
            return report.flops[0] / report.flops[1]
        encoder = statistics.median(run.encoder.wall_s for run in self.plain)
        projector = statistics.median(run.projector.wall_s for run in self.plain)
        language = statistics.median(run.language.wall_s for run in self.plain)
        left = encoder * _share(report.encoder_flops) + projector * _share(report.projector_flops) + language
        return left / (encoder + projector + language)


def _share(flops: tuple[int, int]) -> float:
    """Merged FLOPs of unmerged ones."""
    return flops[0] / flops[1] if flops[1] else 1.0


def compare(
    model: Any,
    load: Workload,
    settings: dict[str, Any],
    rounds: int,
    label: str = "",
    warm_up: bool = True,
    progress: Progress = SILENT,
) -> Comparison:
    """Alternates in this process.

    Args:
        model: an unpatched model; unpatched afterwards.
        load: what it is given.
        settings: arguments of ``patch``.
        rounds: runs of each kind.
        label: of the comparison.
        warm_up: whether a run of each kind comes first that does not count.
        progress: hears of every run.
    """
    inputs = build_workload(model, load)
    plain, merged = measure_alternating(model, inputs, settings, rounds, load.new, warm_up, progress)
    return Comparison(label, plain, merged, merge_cost(model, inputs, settings, load.new - 1))


def measure_once(model: Any, load: Workload, settings: dict[str, Any], merged: bool) -> dict[str, Any]:
    """One run without a warm-up, as data: what a fresh process does."""
    inputs = build_workload(model, load)
    if not merged:
        return {"run": asdict(measure(model, inputs, load.new))}
    patch(model, **settings)
    run = measure(model, inputs, load.new)
    unpatch(model)
    return {"run": asdict(run), "cost": asdict(merge_cost(model, inputs, settings, load.new - 1))}


def compare_fresh(arguments: Sequence[str], rounds: int, progress: Progress = SILENT) -> Comparison:
    """Alternates in fresh processes, so that no run inherits another one's heap.

    Args:
        arguments: of ``illava-hooks bench``; each process gets ``--only`` and what it shall be as well.
        rounds: processes of each kind.
        progress: hears of every one.

    Raises:
        InputError: a process failed.
    """
    runs: dict[str, list[Measurement]] = {"unpatched": [], "merged": []}
    last: dict[str, Any] = {}
    for _ in range(rounds):
        for kind, found in runs.items():
            command = [sys.executable, "-m", "illava_hooks", "bench", *arguments, "--only", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(f"a process of the bench ended with {done.returncode}: {done.stderr.strip()[-300:]}")
            last = json.loads(done.stdout)
            stages: dict[str, Any] = {k: Stage(**v) if isinstance(v, dict) else v for k, v in last["run"].items()}
            found.append(Measurement(**stages))
            progress.advance(1)
    cost = last["cost"]
    report = cost.pop("report")
    visuals = tuple(VisualReport(**visual) for visual in report.pop("visuals"))
    return Comparison("", runs["unpatched"], runs["merged"], MergeCost(MergeReport(visuals=visuals, **report), **cost))


def sweep(
    model: Any,
    axis: str,
    load: Workload,
    settings: dict[str, Any],
    rounds: int,
    told: Callable[[str], None],
    progress: Progress = SILENT,
) -> Iterator[Comparison]:
    """One comparison for every value of an axis; the first one warms the process up for all.

    Args:
        model: an unpatched model.
        axis: a key of ``SWEEPS``.
        load: what stays the same.
        settings: arguments of ``patch``; the axis "methods" goes through a ``Method`` of one's own in them as well.
        rounds: runs of each kind.
        told: is told what runs next.
        progress: hears of every run.

    Raises:
        InputError: there is no such axis.
    """
    if axis not in SWEEPS:
        raise InputError(f"sweep is {axis!r}; choose one of {list(SWEEPS)}")
    values: list[Any] = list(SWEEPS[axis])
    own = settings.get("method")
    if axis == "methods" and isinstance(own, Method) and own.name not in values:
        values.append(own)
    progress.begin(2 * (rounds * len(values) + 1), "runs")
    for number, value in enumerate(values):
        label = getattr(value, "name", str(value)) if axis == "methods" else f"{value} {axis}"
        told(label)
        if axis == "methods":
            yield compare(model, load, {**settings, "method": value}, rounds, label, not number, progress)
        else:
            yield compare(model, replace(load, **{axis: value}), settings, rounds, label, not number, progress)


def flops_fit(comparisons: Sequence[Comparison], merged: bool) -> float:
    """Largest relative distance of the measured prefills from one constant speed.

    Where the language model is left alone, of what precedes it. Time would follow the FLOPs exactly at one number of
    FLOPs per second for all workloads; CPU seconds on a CPU.
    """
    speeds = []
    for found in comparisons:
        runs = found.merged if merged else found.plain
        rest = 0 if found.report.llm_flops[1] or not found.report.encoder_flops[1] else 1
        seconds = statistics.median(run.cpu_s - rest * run.language.cpu_s for run in runs) or statistics.median(
            run.prefill_s - rest * run.language.wall_s for run in runs
        )
        speeds.append(found.report.flops[0 if merged else 1] / seconds)
    middle = statistics.median(speeds)
    return max(abs(middle / speed - 1) for speed in speeds)
