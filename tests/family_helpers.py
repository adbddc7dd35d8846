"""What the tests of the family's members share."""

from helpers import SLOPE
from torch import Tensor
from torch.nn import functional as F

# For float64 against a formula written down in PyTorch's operators.
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def activate(z: Tensor, name: str | None) -> Tensor:
    """The activation by PyTorch's own function."""
    if name is None:
        return z
    return F.leaky_relu(z, SLOPE) if name == "leaky_relu" else getattr(F, name)(z)
