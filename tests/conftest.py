"""What every test stands on: timm can be imported, memory that nobody wrote is NaN, seeds are fixed, and what sk_fused
says once it says anew in every test."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import harness

harness.let_timm_import()

from sk_fused import backends  # noqa: E402

# For small tensors a second thread only waits. What is to be tested with two says so.
torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    # Together they fill what torch.empty and at::empty return with NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    backends._said.clear()
    yield
    assert backends._forced is None, "the test left a backend forced"


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, forced."""
    with backends.use_backend(request.param):
        yield request.param
