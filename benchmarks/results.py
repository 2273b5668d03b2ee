"""Fills docs/RESULTS.md, and what docs/methods.md says to take, from what ``bench`` and ``evaluate`` wrote.

    python benchmarks/results.py                   # the tables and curves of what is in docs/results
    python benchmarks/results.py --measure         # runs the commands first, for all that is not there yet
    python benchmarks/results.py --commands        # prints the commands

What is there is measured again once its file is deleted. An ``evaluate`` that was broken off goes on with the rows
that it left in ``build/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from gpu_tables import fill, gpu_section
from illava_hooks.tools.evaluate import read_header, read_rows
from illava_hooks.tools.evaluate.budgets import KEEP
from real_tower import read_tower_rows
from real_tower import table as tower_table
from result_tables import draw_curves, quality_table, speed_table, sweep_table
from which_rule import Budget, budgets, rules_table, which_table

DOCS = Path(__file__).parents[1] / "docs"
BUILD = Path(__file__).parents[1] / "build" / "results"

#: Tables whose rows are of an earlier command with fewer methods and questions.
OLDER = {f"{model} {suite}" for model in ("tiny", "tiny-qwen2-vl") for suite in ("easy-vqa", "pairs", "clips")}


@dataclass(frozen=True)
class Command:
    """What a table is made of.

    Attributes:
        arguments: of ``illava-hooks``; JSON comes on standard output, rows go to the file by themselves.
        file: in docs/results.
        environment: variables.
    """

    arguments: str
    file: str
    environment: str = ""

    @property
    def path(self) -> Path:
        """The file."""
        return DOCS / "results" / self.file

    @property
    def is_bench(self) -> bool:
        """Whether it measures speed, not quality."""
        return self.file.endswith(".json")

    def __str__(self) -> str:
        """As one types it."""
        return f"{self.environment} illava-hooks {self.arguments}".strip()

    def run(self) -> None:
        """Runs it, where its file is missing."""
        if self.path.exists():
            return
        BUILD.mkdir(parents=True, exist_ok=True)
        environment = os.environ | dict(part.split("=") for part in self.environment.split())
        tool = [sys.executable, "-m", "illava_hooks", *shlex.split(self.arguments)]
        done = subprocess.run(tool, check=True, stdout=subprocess.PIPE, cwd=BUILD, env=environment)
        if self.is_bench:
            self.path.write_bytes(done.stdout)
        else:
            shutil.move(BUILD / self.file, self.path)


def benches() -> dict[str, Command]:
    """The measurements of speed; peaks in one process, where code that is loaded late no longer counts."""
    neutral = "OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000"
    ways = {
        "neutral": (neutral, "--fresh --rounds 2"),
        "recommended": (neutral, "--fresh --rounds 2 --method novel-agnostic"),
        "default": ("OMP_NUM_THREADS=1", "--fresh --rounds 2"),
        "returning": ("OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=262144", "--rounds 1"),
    }
    sweeps = {
        "tiles": "llava-onevision-0.5b --new-tokens 9",
        "frames": "llava-onevision-0.5b --new-tokens 3",
        "patches": "qwen2-vl-2b --new-tokens 9",
        "new": "llava-onevision-0.5b",
        "methods": "llava-onevision-0.5b --new-tokens 9",
    }
    found = {
        f"sweep {axis}": Command(
            f"bench --shape {shape} --sweep {axis} --rounds 1 --json", f"sweep-{axis}.json", "OMP_NUM_THREADS=1"
        )
        for axis, shape in sweeps.items()
    }
    for shape, size in (("llava-onevision-0.5b", "--tiles 3"), ("qwen2-vl-2b", "--patches 4096")):
        for way, (environment, options) in ways.items():
            arguments = f"bench --shape {shape} {size} {options} --new-tokens 17 --json"
            found[f"speed {shape} {way}"] = Command(arguments, f"speed-{shape}-{way}.json", environment)
    return found


def evaluations() -> dict[str, Command]:
    """The measurements of quality."""
    asked = "--questions 2000 --stages"
    # In the encoder alone novel-agnostic is novel, and in the language model alone novel is diverse.
    both, encoder, language = (
        f"--kept 0.3333,0.1111 --methods illava,diverse,{name},fastv,nearest,tome,random"
        for name in ("novel,novel-agnostic", "novel", "novel-agnostic")
    )
    four, controls = "illava,diverse,fastv,random", "tome,nearest,illava-v2,uniform,downsample"
    curve = "--kept 0.5,0.3333,0.2222,0.1111"
    tables = {
        "both": f"--items scenes {asked} both {both}",
        "encoder": f"--items scenes {asked} encoder {encoder}",
        "language": f"--items scenes {asked} language {language}",
        **{suite: f"--items {suite} {asked} both {both}" for suite in ("easy-vqa", "pairs", "clips")},
        "keep": "--items scenes --questions 2000 --keep 1/3,1/9 --methods illava,diverse,novel-agnostic",
        "scenes": f"--items scenes {asked} both {curve} --methods {four},{controls}",
        "stages": f"--items scenes --questions 1000 --stages encoder,language,both {curve} --methods {four}",
        "headline": f"--items scenes --questions 6000 --stages both --kept 0.3333,0.1111 --methods {four}",
    }
    # The published layout of LLaVA-OneVision needs a square number of survivors.
    choices = {"tiny": "encoder --kept 0.5625,0.25", "tiny-qwen2-vl": "encoder,language --kept 0.3333,0.1111"}
    found = {}
    for model, choice in choices.items():
        published = f"--items scenes {asked} {choice} --methods illava,illava-reference"
        for table, arguments in {**tables, "choices": published}.items():
            if f"{model} {table}" in OLDER:
                arguments = f"--items {table} --questions 1000 --stages both --kept 0.3333,0.1111 --methods {four}"
            file = f"{model}-{table}.jsonl"
            found[f"{model} {table}"] = Command(f"evaluate --model {model} {arguments} --output {file}", file)
    return found


def which() -> list[Budget]:
    """All budgets at which methods were compared, in files that say what they were measured with."""
    found: list[Budget] = []
    for name, command in evaluations().items():
        model, table = name.split()
        if table not in ("choices", KEEP) and command.path.exists() and read_header(command.path) is not None:
            items = "scenes" if table in ("both", "encoder", "language") else table
            found += budgets(model, items, read_rows(command.path))
    return found


def measured_with(header: dict[str, Any] | None) -> str:
    """What a file of rows says of its run."""
    if header is None:
        return "Rows of an earlier `evaluate`, which kept neither answers nor the measured fraction of all items."
    versions, model = header["versions"], header["model"]
    packages = " and ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return f"Measured with {packages} on {model['device']}, {model['dtype']}."


def still_missing(command: Command) -> list[str]:
    """What an ``evaluate`` that was broken off has not measured yet, in words."""
    words = shlex.split(command.arguments)
    asked = dict(zip(words, words[1:], strict=False))
    kept = [float(Fraction(part)) for part in asked.get("--kept", asked.get("--keep", "")).split(",")]
    known = {row.key for row in read_rows(command.path)}
    found = []
    for stage in asked.get("--stages", KEEP).split(","):
        for fraction in kept:
            names = [name for name in asked["--methods"].split(",") if (name, stage, fraction) not in known]
            names = [name for name in names if (name, "both", fraction) not in known or name != "downsample"]
            found += [f"{stage}, {fraction:.3f}: {', '.join(names)}"] * bool(names)
    return found


def table_of(command: Command) -> list[str]:
    """The table of what a command wrote."""
    if not command.is_bench:
        told = measured_with(read_header(command.path))
        if missing := still_missing(command):
            told += f" The run was broken off; not measured yet: {'; '.join(missing)}."
        return [*quality_table(read_rows(command.path)), "", told]
    found = json.loads(command.path.read_text())
    return sweep_table(found) if isinstance(found, list) else speed_table(found)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the commands for what is missing")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    given, page = parser.parse_args(), (DOCS / "RESULTS.md").read_text()
    page = fill(page, "gpu", "\n".join(gpu_section(DOCS / "results", DOCS / "results" / "launches.json")))
    for name, command in {**benches(), **evaluations()}.items():
        if given.commands:
            print(command)
            continue
        if given.measure:
            command.run()
        if not command.path.exists():
            page = fill(page, name, f"`{command}`\n\nNot measured yet.")
        else:
            page = fill(page, name, "\n".join([f"`{command}`", "", *table_of(command)]))
            if name.endswith(("both", "encoder", "language", "scenes")):
                draw_curves(read_rows(command.path), command.path)
    if given.commands:
        return
    page = fill(page, "real tower", "\n".join(tower_table(read_tower_rows(DOCS / "results" / "real-tower.jsonl"))))
    (DOCS / "RESULTS.md").write_text(page)
    methods, found = DOCS / "methods.md", which()
    text = fill(methods.read_text(), "rules", "\n".join(rules_table(found)))
    methods.write_text(fill(text, "budgets", "\n".join(which_table(found))))


if __name__ == "__main__":
    main()
