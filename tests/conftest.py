"""What every test gets: one thread, a fixed seed, and no GPU test where there is no GPU."""

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

#: Tests of other libraries run in an environment of their own: `make test-clients`.
collect_ignore = [] if os.environ.get("ILLAVA_CLIENTS") else ["clients"]


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
