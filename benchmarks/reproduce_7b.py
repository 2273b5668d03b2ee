"""Runs the benchmarks of the paper on published 7B weights, unpatched and merged: `make reproduce-7b`.

Wants a CUDA device, the weights and the tasks' data (a model hub, or its cache). The harness is lmms-eval as it is, in
an environment of its own; a run that has finished is not started again, so a broken-off command goes on.

    python benchmarks/reproduce_7b.py --python build/lmms-eval/bin/python               # all of it: days
    python benchmarks/reproduce_7b.py --python ... --tasks mmstar --limit 200           # an hour
    python benchmarks/reproduce_7b.py --dry-run                                         # the commands
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build" / "reproduce-7b"

#: What the published project evaluates on, by the harness's names.
IMAGES = ("mmmu_val", "mmbench_en_dev", "mmstar", "mme", "mmvet")
VIDEOS = ("videomme",)

#: Beside the unpatched model: the paper's settings, and the rule that the docs recommend with the same amounts.
METHODS = ("illava", "diverse")

#: What the authors say of the same comparison, and where.
EXPECTED = """\
The paper's abstract gives no table for these two models together, only differences: 0.2 to 0.5 % lower on average, at
nearly twice the throughput (arXiv:2412.06263v1); up to 2x throughput and 4x less prefill time (ICLR 2026 version)."""


@dataclass(frozen=True)
class Published:
    """A model that the paper evaluates.

    Attributes:
        weights: on the hub.
        stock: the harness's own model.
        arguments: of that model, the same for all runs.
    """

    weights: str
    stock: str
    merged: str
    arguments: str = ""


MODELS = {
    "llava-onevision": Published(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_hf", "llava_onevision_illava", "dtype=bfloat16"
    ),
    "qwen2-vl": Published("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", "qwen2_vl_illava"),
}


@dataclass(frozen=True)
class Run:
    """One command of the harness.

    Attributes:
        model: a key of ``MODELS``.
        method: a key of ``illava_hooks.METHODS``; none: the unpatched model.
        task: the harness's name.
        limit: questions at most; none: all.
    """

    model: str
    method: str | None
    task: str
    limit: int | None = None

    @property
    def folder(self) -> Path:
        """Where the harness writes."""
        return BUILD / self.model / self.task / f"{self.method or 'stock'}-{self.limit or 'all'}"

    def command(self, python: str) -> list[str]:
        """As one types it; amounts and layers are the preset's, which are the paper's."""
        published = MODELS[self.model]
        arguments = [f"pretrained={published.weights}", published.arguments, f"method={self.method}"]
        given = ",".join(argument for argument in arguments[: 2 if self.method is None else 3] if argument)
        name = published.stock if self.method is None else published.merged
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        simple = ["--force_simple"] if self.model == "llava-onevision" and self.task in VIDEOS else []
        return [
            *(python, "-m", "lmms_eval", "--model", name, "--model_args", given, "--tasks", self.task),
            *("--batch_size", "1", *limit, *simple, "--log_samples", "--output_path", str(self.folder)),
        ]

    def found(self) -> dict[str, float] | None:
        """Figures by metric and the seconds that it took, from what the harness wrote; none: it has not finished."""
        files = sorted(self.folder.rglob("*_results.json"))
        if not files:
            return None
        said = json.loads(files[-1].read_text())
        figures = {
            name.partition(",")[0]: float(value)
            for name, value in said["results"][self.task].items()
            if isinstance(value, int | float) and "_stderr" not in name
        }
        return figures | {"seconds": float(said["total_evaluation_time_seconds"])}


def planned(models: Iterable[str], tasks: Iterable[str], limit: int | None) -> list[Run]:
    """All runs, those of one task beside each other."""
    return [Run(model, method, task, limit) for model in models for task in tasks for method in (None, *METHODS)]


def table(found: Mapping[Run, Mapping[str, float]]) -> str:
    """The figures, as Markdown; what is missing has not been run."""
    lines = ["| model | task | figure | unpatched | " + " | ".join(METHODS) + " |", "|---|---|---|" + "--:|" * 3]
    for stock in [run for run in found if run.method is None]:
        beside = [found.get(Run(stock.model, method, stock.task, stock.limit), {}) for method in METHODS]
        for metric, value in found[stock].items():
            ours = [f"{row[metric]:.4g}" if metric in row else "not run" for row in beside]
            lines.append(f"| {stock.model} | {stock.task} | {metric} | {value:.4g} | {' | '.join(ours)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table.

    Args:
        arguments: of the command line; by default those of this process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the environment with lmms-eval and this package")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=[*IMAGES, *VIDEOS], default=[*IMAGES, *VIDEOS])
    parser.add_argument("--limit", type=int, help="questions of each task at most")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what there is already")
    given = parser.parse_args(arguments)
    runs = planned(given.models, given.tasks, given.limit)
    for run in runs:
        command = run.command(given.python)
        there = run.found() is not None
        print(f"{'done before: ' if there else ''}{shlex.join(command)}", flush=True)
        if there or given.dry_run:
            continue
        done = subprocess.run(command, check=False)
        if done.returncode or run.found() is None:  # the harness may end with 0 and no figures
            raise SystemExit(f"{run.model}, {run.task}, {run.method or 'unpatched'}: the harness wrote no figures")
    print(f"\n{table({run: found for run in runs if (found := run.found()) is not None})}\n\n{EXPECTED}")


if __name__ == "__main__":
    main()
