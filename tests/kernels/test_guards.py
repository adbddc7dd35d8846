"""The kernels called directly: what they cannot do they refuse."""

from typing import Any

import pytest
import torch

from batchnorm import BackendError
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import launch

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())

NONE = torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["moments", "forward", "backward", "normalize", "grad_sums", "grad_input"])
def test_no_kernel_ignores_a_mask_or_groups(name: str, groups: int) -> None:
    x, mask = torch.randn(4, 3), torch.ones(4) if groups == 1 else None
    one, n = torch.ones(groups, 3, dtype=torch.float64), torch.ones(groups, 1, dtype=torch.float64)
    gradient = (None, None, NONE, False, mask)
    calls: dict[str, tuple[Any, ...]] = {
        "moments": (x, mask, groups),
        "forward": (x, None, None, None, mask, groups, 1e-5, None, 0.0),
        "backward": (x, x, one, one, n, *gradient, 1e-5, None, 0.0),
        "normalize": (x, one, one, None, None, None, mask, None, 0.0),
        "grad_sums": (x, x, one, one, *gradient, None, 0.0),
        "grad_input": (x, x, one, one, *gradient, one, one, n, None, 0.0),
    }
    with pytest.raises(BackendError, match="mask" if groups == 1 else "2 groups"):
        getattr(launch, name)(*calls[name])
