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
from variants import without_sizes
from which_rule import Budget, budgets, overview_table, rules_table, which_table

ROOT = Path(__file__).parents[1]
DOCS, BUILD = ROOT / "docs", ROOT / "build" / "results"

#: Kinds of items, as the pages call them, and stages.
ITEMS = {"scenes": "Single images", "pairs": "Two images in a prompt", "clips": "Clips", "easy-vqa": "easy-VQA"}
STAGES = {"both": "Both stages", "encoder": "Encoder alone", "language": "Language model alone"}
MODELS = {"tiny": "LLaVA-OneVision (embedded)", "tiny-qwen2-vl": "Qwen2-VL (embedded)"}
WITHOUT_SIZES = "benchmarks/variants.py:without_sizes"
#: What ``which_rule.SAME`` says, in words.
SAME_WORDS = {
    "both": "",
    "encoder": "In the encoder alone `novel-agnostic` is `novel`.",
    "language": "In the language model alone `novel` is `diverse`, and sizes count in the encoder only.",
}
#: Further rows where single images merge in both stages.
CONTROLS = ",illava-v2,uniform,downsample"


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
        words = [str(BUILD / word) if word == self.file else word for word in shlex.split(self.arguments)]
        tool = [sys.executable, "-m", "illava_hooks", *words]
        done = subprocess.run(tool, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
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


def methods_of(stage: str) -> str:
    """What is compared in a stage; what ``SAME`` calls the same is measured once."""
    names = ["illava", "diverse", "novel", "novel-agnostic", WITHOUT_SIZES, "fastv", "nearest", "tome", "random"]
    left_out = {"encoder": ["novel-agnostic"], "language": ["novel", WITHOUT_SIZES]}.get(stage, [])
    return ",".join(name for name in names if name not in left_out)


def evaluations() -> dict[str, Command]:
    """The measurements of quality."""
    tables = {
        f"{items}-{stage}": f"--items {items} --questions 2000 --stages {stage} --kept 0.5,0.3333,0.2222,0.1111 "
        f"--methods {methods_of(stage)}{CONTROLS if (items, stage) == ('scenes', 'both') else ''}"
        for items in ITEMS
        for stage in STAGES
    }
    tables["keep"] = "--items scenes --questions 2000 --keep 1/3,1/9 --methods illava,diverse,novel-agnostic"
    # The published layout of LLaVA-OneVision needs a square number of survivors.
    choices = {"tiny": "encoder --kept 0.5625,0.25", "tiny-qwen2-vl": "encoder,language --kept 0.3333,0.1111"}
    found = {}
    for model, choice in choices.items():
        published = f"--items scenes --questions 2000 --stages {choice} --methods illava,illava-reference"
        for table, arguments in {**tables, "choices": published}.items():
            file = f"{model}-{table}.jsonl"
            found[f"{model} {table}"] = Command(f"evaluate --model {model} {arguments} --output {file}", file)
    return found


def stages_of(model: str, items: str) -> dict[str, Command]:
    """The commands that measured one kind of items, by stage."""
    return {stage: evaluations()[f"{model} {items}-{stage}"] for stage in STAGES}


def which(model: str, items: str) -> list[Budget]:
    """All budgets at which methods were compared."""
    measured = [command.path for command in stages_of(model, items).values() if command.path.exists()]
    return [budget for path in measured for budget in budgets(model, items, read_rows(path))]


def measured_with(header: dict[str, Any]) -> str:
    """What a file of rows says of its run."""
    versions, model = header["versions"], header["model"]
    packages = " and ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return f"Measured with {packages} on {model['device']}, {model['dtype']}."


def still_missing(command: Command) -> list[str]:
    """What an ``evaluate`` that was broken off has not measured yet, in words."""
    words = shlex.split(command.arguments.replace(WITHOUT_SIZES, f"'{without_sizes.name}'"))
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
    if not command.path.exists():
        return ["Not measured yet."]
    if not command.is_bench:
        header = read_header(command.path)
        if header is None:
            raise SystemExit(f"{command.path} says nothing of the run that it is of; measure it anew")
        told = measured_with(header)
        if missing := still_missing(command):
            told += f" The run was broken off; not measured yet: {'; '.join(missing)}."
        return [*quality_table(read_rows(command.path)), "", told]
    found = json.loads(command.path.read_text())
    return sweep_table(found) if isinstance(found, list) else speed_table(found)


def with_command(command: Command) -> str:
    """The command and its table."""
    return "\n".join([f"`{command}`", "", *table_of(command)])


def write_page(model: str, items: str) -> None:
    """The page with all rows of one model on one kind of items, with their intervals."""
    title = f"# {MODELS[model]}: {ITEMS[items].lower() if items != 'easy-vqa' else ITEMS[items]}"
    parts = [title, "What the columns are stands in [Results](../RESULTS.md#quality)."]
    for stage, command in stages_of(model, items).items():
        parts += [f"## {STAGES[stage]}", SAME_WORDS[stage], with_command(command)]
    (DOCS / "results" / f"{model}-{items}.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def overview(model: str) -> str:
    """Accuracy of one model on all kinds of items."""
    parts = []
    for items, title in ITEMS.items():
        if found := which(model, items):
            stock = read_rows(next(c.path for c in stages_of(model, items).values() if c.path.exists()))[0]
            link = f"All rows with their intervals, and the commands: [{model}-{items}](results/{model}-{items}.md)."
            parts += [f"#### {title}", "\n".join(overview_table(found, stock)), link]
    return "\n\n".join(parts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the commands for what is missing")
    parser.add_argument("--commands", action="store_true", help="print the commands")
    given, page = parser.parse_args(), (DOCS / "RESULTS.md").read_text()
    commands = {**benches(), **evaluations()}
    if given.commands:
        print(*commands.values(), sep="\n")
        return
    if given.measure:
        for command in commands.values():
            command.run()
    page = fill(page, "gpu", "\n".join(gpu_section(DOCS / "results", DOCS / "results" / "launches.json")))
    compared: list[Budget] = []
    for model in MODELS:
        for items in ITEMS:
            write_page(model, items)
            compared += which(model, items)
        for stage, command in stages_of(model, "scenes").items():
            if command.path.exists():
                draw_curves(read_rows(command.path), command.path, f"{MODELS[model]}, {STAGES[stage].lower()}")
        page = fill(page, f"{model} quality", overview(model))
    paged = {command.file for model in MODELS for items in ITEMS for command in stages_of(model, items).values()}
    for name, command in commands.items():
        if command.file not in paged:
            page = fill(page, name, with_command(command))
    page = fill(page, "real tower", "\n".join(tower_table(read_tower_rows(DOCS / "results" / "real-tower.jsonl"))))
    (DOCS / "RESULTS.md").write_text(page)
    methods = DOCS / "methods.md"
    text = fill(methods.read_text(), "rules", "\n".join(rules_table(compared)))
    methods.write_text(fill(text, "budgets", "\n".join(which_table(compared))))


if __name__ == "__main__":
    main()
