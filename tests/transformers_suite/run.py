"""Runs transformers' own model tests on stock and patched models, and compares what becomes of each test.

``PYTHONPATH=tests python -m transformers_suite.run`` tests the transformers that is installed, or the one in front of
it on ``PYTHONPATH``. The first run of a version downloads its source distribution into ``build/``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from transformers_suite.expected import DIFFERENT, UNPATCHED
from transformers_suite.modes import CLASSES, LEFT_OUT, MODES, SAMPLE_MODES, SAMPLED, in_sample
from transformers_suite.outcomes import Outcomes
from transformers_suite.sdist import unpack

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "transformers-suite"
PAGE = ROOT / "docs" / "COMPATIBILITY.md"
FAMILIES = {
    name: suite.title or family.title + ", experts" * name.endswith("Moe") for name, (family, suite) in CLASSES.items()
}

#: Names of the runs in tables.
TITLES = {
    "stock": "unpatched",
    "identity": "patched, nothing to remove",
    "idle": "patched, a share too small to remove anything",
    "merging": "patched, merging",
}


def main() -> int:
    """Runs, prints, writes; 1 where anything surprises."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--workers", default="2", help="processes that share the tests of a run")
    parser.add_argument("--all", action="store_true", help="all tests in all runs, also where a sample is enough")
    parser.add_argument("--only", nargs="+", choices=list(CLASSES), help="these; of others the last results stay")
    parser.add_argument("--write", action="store_true", help=f"fill this version's table in {PAGE.name}")
    options = parser.parse_args()
    release, began = version("transformers"), time.monotonic()
    names, sampled = options.only or list(CLASSES), frozenset() if options.all else SAMPLED
    plan = {mode: [n for n in names if n not in sampled or mode in SAMPLE_MODES] for mode in MODES}
    runs = {mode: run(mode, release, options.workers, chosen, bool(sampled)) for mode, chosen in plan.items()}
    lines = table({mode: kept(mode, release, names, runs[mode]) for mode in runs} if options.write else runs)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU"
    print(f"\ntransformers {release}, torch {version('torch')}: {took}", *lines, sep="\n")
    if options.write:
        write(release, lines)
    found = surprises(runs, plan, sampled)
    print("", *(found or ["no surprises"]), sep="\n")
    return int(bool(found))


def run(mode: str, release: str, workers: str, names: list[str], sample: bool) -> Outcomes:
    """One run of the suite in a process of its own.

    Args:
        mode: One of ``MODES``.
        release: The version of transformers.
        workers: Processes that share the tests.
        names: The models.
        sample: Whether a sample is enough on ``SAMPLED``.

    Returns:
        The outcomes.

    Raises:
        SystemExit: pytest could not run.
    """
    tests = unpack(release, BUILD)
    report = tests / f"{mode}-now.json"
    report.unlink(missing_ok=True)
    if not names:
        return {}
    paths = [str(tests), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_SUITE_MODE": mode,
        "HF_SUITE_MODELS": " ".join(names),
        **({"HF_SUITE_SAMPLE": "1"} if sample else {}),
        "HF_SUITE_REPORT": str(report),
        "PYTHONHASHSEED": "4",  # some take the first of a set of names: in all modes one that the model has
    }
    # transformers' tests warn and mark as they like; what a failure looks like is for those who run it alone.
    options = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--disable-warnings"]
    options += ["-p", "transformers_suite.outcomes", "-n", workers, "-q", "--tb=no", "--no-header", "--no-summary"]
    print(f"{TITLES[mode]}: ", end="", flush=True)
    suite = str(ROOT / "tests" / "transformers_suite" / "suite.py")
    command = [sys.executable, "-m", "pytest", *options, suite]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit(f"pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    print(done.stdout.strip().rpartition("\n")[2], flush=True)
    outcomes: Outcomes = json.loads(report.read_text())
    return outcomes


def kept(mode: str, release: str, names: list[str], outcomes: Outcomes) -> Outcomes:
    """Outcomes of some models, and those of others that were kept last; keeps them all."""
    results = BUILD / release / f"{mode}.json"
    known: Outcomes = json.loads(results.read_text()) if results.exists() else {}
    known = {test: what for test, what in known.items() if class_of(test) not in names} | outcomes
    results.write_text(json.dumps(known, indent=1, sort_keys=True))
    return known


def class_of(test: str) -> str:
    """The class of a test, which is the name of a model."""
    return test.partition("::")[0]


def surprises(runs: dict[str, Outcomes], plan: dict[str, list[str]], sampled: frozenset[str]) -> list[str]:
    """One line for everything that is not as it should be, of the models that were to be run in each mode.

    Args:
        runs: The outcomes, by mode.
        plan: The models, by mode.
        sampled: Those of which a sample was run.
    """
    stock, found = runs["stock"], []
    for mode, outcomes in runs.items():
        for name in sorted(test for test in {*stock, *outcomes} if class_of(test) in plan[mode]):
            before, after = (run.get(name, {"outcome": "missing", "message": ""}) for run in (stock, outcomes))
            wanted = before["outcome"]
            if mode == "merging" and name in DIFFERENT and wanted == "passed":
                wanted = "failed"
            if after["outcome"] != wanted:
                message = str(after["message"]).partition("\n")[0][:200]
                found.append(f"{mode}: {name} should be {wanted}, is {after['outcome']}: {message}")
        for family in plan[mode]:
            patched, merged = (count(outcomes, family, what) for what in ("patched", "merged"))
            if (patched > 0) != (mode != "stock") or (merged > 0) != (mode == "merging"):
                found.append(f"{mode}: {patched} models of {family} were patched, {merged} merged")
    unknown = sorted(
        test
        for test in {*DIFFERENT, *UNPATCHED} - {*stock}
        if class_of(test) in plan["stock"] and (class_of(test) not in sampled or in_sample(*test.split("::")))
    )
    return found + [f"expected.py names {name}, which no test is called" for name in unknown]


def count(outcomes: Outcomes, family: str, what: str) -> int:
    """Tests of a family with an outcome; or its models that were patched, or that merged."""
    own = [test for name, test in outcomes.items() if name.startswith(f"{family}::")]
    if what in ("patched", "merged"):
        return sum(test[what] for test in own)
    return sum(test["outcome"] == what for test in own)


def table(runs: dict[str, Outcomes]) -> list[str]:
    """Counts of each run, and the failures with their reasons, in Markdown."""
    columns = ("passed", "failed", "skipped", "patched", "merged")
    lines = ["| family | run | passed | failed | skipped | models patched | models that merged |", "|---" * 7 + "|"]
    for family, title in FAMILIES.items():
        for mode, outcomes in runs.items():
            counts = [str(count(outcomes, family, what)) for what in columns]
            own = [test.partition("::")[2] for test in outcomes if class_of(test) == family]
            if own:
                name = title if any(LEFT_OUT.match(test) for test in own) else f"{title} (a sample)"
                lines.append(f"| {' | '.join([name, TITLES[mode], *counts])} |")
    failed: dict[str, list[str]] = {}
    for mode, outcomes in runs.items():
        for name, test in sorted(outcomes.items()):
            if test["outcome"] == "failed":
                failed.setdefault(name, []).append(TITLES[mode])
    lines += [""] + [f"- `{name}` ({'; '.join(where)}): {_reason(name, where)}." for name, where in failed.items()]
    skipped = [test["message"] for test in runs["stock"].values() if test["outcome"] == "skipped"]
    absent = sum("requires" in message for message in skipped)
    lines.append(
        f"- Of the {len(skipped)} that are skipped, {absent} want a GPU or a package that is not installed, and "
        f"{len(skipped) - absent} do not apply to these models; transformers skips them itself."
    )
    return lines


def _reason(name: str, where: list[str]) -> str:
    if TITLES["stock"] in where:
        return "fails without the patch" + (f": {UNPATCHED[name]}" if name in UNPATCHED else "")
    return DIFFERENT.get(name, "unexplained")


def write(release: str, lines: list[str]) -> None:
    """Puts a version's table between its marker and the next end.

    Raises:
        SystemExit: the page has no place for the version.
    """
    marker = f"<!-- hf-tests {release} -->"
    filled = "\n".join([f"transformers {release}, torch {version('torch')}:", "", *lines])
    text, found = re.subn(
        rf"({re.escape(marker)}\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{filled}\n{match[2]}",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    if not found:
        raise SystemExit(f"{PAGE} has no {marker} ... <!-- end -->")
    PAGE.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
