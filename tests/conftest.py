"""What every test gets: one thread, a fixed seed, and no GPU test where there is no GPU."""

import os
import sys
import zlib
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

#: Tests of other libraries run in environments of their own: `make test-clients`, `make test-ray`, `make test-vllm`.
_OF_OTHERS = {"clients": "ILLAVA_CLIENTS", "ray_data": "ILLAVA_RAY", "vllm_engine": "ILLAVA_VLLM"}
collect_ignore = [folder for folder, wanted in _OF_OTHERS.items() if not os.environ.get(wanted)]


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's global generator; tests that draw numbers of their own can ask for the seed."""
    value = 20241206
    torch.manual_seed(value)
    return value


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Runs a test without autograd."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def golden_limit() -> Iterator[None]:
    """Once all tests of a module have run, the largest error of every golden case is held to its limit."""
    from golden_checks import check_limit

    yield
    check_limit()


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state for the process, which refuses another precision: no test leaves it to the next."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


#: Where families differ. The rest is about the engine: two families show it, and `make test-families` all of them.
#: ILLAVA_FAMILIES "all" is for everything on every family, "embedded" for everything on those with embedded models.
OF_EVERY_FAMILY = {
    "test_batching.py",
    "test_every_family.py",
    "test_generate.py",
    "test_identity.py",
    "test_keep.py",
    "test_no_trace.py",
    "test_provenance.py",
    "test_reference.py",
    "test_report.py",
}

#: Of their cases, families without an embedded model get one of so many, each family others; all of the first file.
WHOLE, ONE_OF = "test_every_family.py", 16

#: Of all tests one of so many: where another run has them all, as on the lowest releases.
SHARE = int(os.environ.get("ILLAVA_ONE_OF", "1"))


def _is_left_out(item: pytest.Item) -> bool:
    """Whether a test is for the night, or repeats on a family without an embedded model what is known of others."""
    from families import FAMILIES, family

    if item.get_closest_marker("nightly"):
        return True
    if item.path.parent.name in ("families_only", *_OF_OTHERS):
        return False
    values = getattr(item, "callspec", None) and item.callspec.params.values()  # type: ignore[attr-defined]
    if not any(isinstance(v, str) and v in FAMILIES and family(v).embedded is None for v in values or ()):
        return False
    if item.path.name not in OF_EVERY_FAMILY or os.environ.get("ILLAVA_FAMILIES") == "embedded":
        return True
    return item.path.name != WHOLE and not _in_sample(item.nodeid, ONE_OF)


def _in_sample(name: str, one_of: int) -> bool:
    return zlib.crc32(name.encode()) % one_of == 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `make test-families` is for; skip what is marked `gpu` on a machine without one."""
    out = [item for item in items if not _in_sample(item.nodeid[::-1], SHARE)]  # another sample than that of families
    if os.environ.get("ILLAVA_FAMILIES") != "all":
        out += [item for item in items if _is_left_out(item)]
    if left_out := set(out):
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    if torch.cuda.is_available() or os.environ.get("ILLAVA_GPU_DEVICE"):  # of a rehearsal on a CPU
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
