from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    # torch.empty gives NaN: a kernel that reads what it has not written shows.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
