"""The examples run offline, on a real photo and a real video, and print what they promise."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import offline
import quickstart
from families import family_of

EXAMPLES = Path(offline.__file__).parent


def run(*arguments: str) -> str:
    """Run an example as a user does and return what it prints."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command,
        cwd=EXAMPLES,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart() -> None:
    sections = run("quickstart.py", "--tiny").split("=== ")[1:]
    titles = [section.split(":")[0] for section in sections]
    assert titles == [f"{family}, {kind}" for family in offline.FAMILIES for kind in ("photo", "video")]
    for title, section in zip(titles, sections, strict=True):
        expected = family_of(title.partition(",")[0]).paper_kept
        kept = re.search(r"kept fraction of visual tokens: ([\d.]+)", section)
        assert kept and float(kept[1]) == pytest.approx(expected, abs=0.04), section  # rounding

        assert re.search(r"\d+ -> \d+", section), "tokens per stage"
        shapes = re.search(r"shape of the logits: (\[.+?\]), patched (\[.+?\])", section)
        assert shapes and shapes[1] == shapes[2]
        times = re.search(r"prefill, median of 3: ([\d.]+) s without merging, ([\d.]+) s with", section)
        assert times and all(0 < float(seconds) < 60 for seconds in times.groups())
        assert len(re.findall(r"(?:generated ids|patched): \[\d+(?:, \d+){0,7}\]", section)) == 2
        assert "merging off: equal to the stock model: True" in section


def test_quickstart_fails_when_merging_cannot_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["quickstart.py", "--tiny"])
        monkeypatch.setattr(quickstart, "merging", lambda model, enabled: nullcontext(model))  # a broken switch
        with pytest.raises(SystemExit) as caught:
            quickstart.main()
    # A text as code is printed to stderr, and the status is 1.
    assert caught.value.code == f"merging off: {offline.FAMILIES[0]} differs from the stock model on the photo"
    assert "equal to the stock model" not in capsys.readouterr().out


def test_one_line() -> None:
    assert run("one_line.py").strip() == "1"


def test_switch() -> None:
    text = run("switch.py")
    assert text.count("equal to the stock model's: True") == text.count("equal to the first ones: True") == 2
    assert text.count("taken back, logits equal: True; None") == 2
    assert [found.strip() for found in re.findall(r"with merging \['(.*?)'\]", text)] == ["blue", "blue"]


def test_batch() -> None:
    text = run("batch.py")
    assert text.count("the same in a batch as alone: True") == 2 and text.count("2 images: ") == 2


def test_video() -> None:
    text = run("video.py")
    assert re.findall(r"8 frames: (\w+)", text) == re.findall(r"without merging: (\w+)", text) == ["left", "left"]


def test_multi_turn() -> None:
    text = run("multi_turn.py")
    assert "Which image has a red circle? second" in text
    positions = [int(found) for found in re.findall(r"cache: (\d+) positions", text)]
    widths = [json.loads(found) for found in re.findall(r"positions, (\[.*\]) keys", text)]
    assert positions[1] > positions[0] and all(max(w) < p for w, p in zip(widths, positions, strict=True))


def test_provenance() -> None:
    rows = re.findall(
        r"(\w+), (vision|language) layer (\d+): (\d+) tokens stand for (\d+) patches", run("provenance.py")
    )
    assert {row[:2] for row in rows} == {
        (family, stage) for family in offline.FAMILIES for stage in ("vision", "language")
    }
    assert all(int(tokens) < int(patches) for _, _, _, tokens, patches in rows)


def test_custom_method() -> None:
    text = run("custom_method.py")
    assert "method: checkerboard, answer: 1" in text
    assert "320 -> 160" in text, "32 of the 64 fields of each of five tiles are black"


def test_compare_outputs() -> None:
    text = run("compare_outputs.py", "--tiny", "--tokens", "4", "--method", "fastv")
    assert re.findall(r"=== (\w+), method (\S+)", text) == [(family, "fastv") for family in offline.FAMILIES]
    differences = [float(found) for found in re.findall(r"max logit difference: ([\d.]+)", text)]
    assert len(differences) == 2 and all(0 < difference < 100 for difference in differences)
    assert text.count("unpatched: ") == 2


@pytest.mark.nightly
def test_compare_outputs_refuses_unknown_methods() -> None:
    with pytest.raises(AssertionError, match="invalid choice: 'best'"):
        run("compare_outputs.py", "--tiny", "--method", "best")


@pytest.mark.parametrize("family", offline.FAMILIES)
def test_offline_models_are_reproducible(family: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = (offline.build(family, tiny=True)[0].state_dict() for _ in range(2))
    other = offline.build(family, tiny=True, seed=1)[0].state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", offline.FAMILIES)
def test_offline_prompts_survive_the_tokenizer(family: str) -> None:
    _, processor = offline.build(family, tiny=True)
    question = "Où est le café? 你好"
    inputs = offline.ask(processor, question, offline.photo())
    text = processor.decode(inputs["input_ids"][0])
    assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) > 50
    assert [ids.count(processor.tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>")] == [2, 1]


def test_the_video_is_a_film() -> None:
    frames = offline.video(4)
    assert frames.shape == (4, 272, 640, 3) and frames.dtype == np.uint8
    assert min(np.abs(a - b).mean() for a, b in zip(frames[:-1].astype(float), frames[1:], strict=True)) > 1
