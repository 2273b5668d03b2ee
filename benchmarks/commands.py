"""The commands behind docs/RESULTS.md: what is measured, and where what they write lies."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from which_rule import SAME

ROOT = Path(__file__).parents[1]
DOCS, BUILD = ROOT / "docs", ROOT / "build" / "results"

#: Kinds of items, as the pages call them, and stages.
ITEMS = {"scenes": "Single images", "pairs": "Two images in a prompt", "clips": "Clips", "easy-vqa": "easy-VQA"}
STAGES = {"both": "Both stages", "encoder": "Encoder alone", "language": "Language model alone"}
MODELS = {"tiny": "LLaVA-OneVision (embedded)", "tiny-qwen2-vl": "Qwen2-VL (embedded)"}
WITHOUT_SIZES = "benchmarks/variants.py:without_sizes"
SELECTIVE_WITHOUT_SIZES = "benchmarks/variants.py:selective_without_sizes"
#: What was added when the others had been measured: of its own command and code.
LATER = "selective"
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
    tables |= {
        f"{items}-{stage}-{LATER}": f"--items {items} --questions 2000 --stages {stage} "
        f"--kept 0.5,0.3333,0.2222,0.1111 --methods {LATER},{SELECTIVE_WITHOUT_SIZES}"
        for items in ITEMS
        for stage in STAGES
        if LATER not in SAME.get(stage, {})
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


def stages_of(model: str, items: str) -> dict[str, list[Command]]:
    """The commands that measure one kind of items, by stage."""
    known = evaluations()
    return {stage: [known[name] for name in names_of(model, items, stage) if name in known] for stage in STAGES}


def names_of(model: str, items: str, stage: str) -> tuple[str, str]:
    """The commands that measure one stage, by name, some of which there may be none of."""
    return f"{model} {items}-{stage}", f"{model} {items}-{stage}-{LATER}"
