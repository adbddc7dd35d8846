"""What the members of the family share: one class for any number of axes behind the channels."""

from typing import TYPE_CHECKING, ClassVar

from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.batch_norm import Sized

__all__ = ["AnyBatchNorm", "Member"]

if TYPE_CHECKING:
    _Base = Sized
else:

    class _Base(Sized, _BatchNorm):
        pass


class Member(_Base):
    """The base of a layer that takes (N, C) and (N, C, *S) alike; `isinstance` holds for PyTorch's `_BatchNorm`.

    A subclass says in `_policy` what stands between the statistics of the batch and their use.
    """

    _dimensions: ClassVar[None] = None
    _is_plain = False


class AnyBatchNorm(Member):
    """Plain batch norm for any number of axes behind the channels: what other layers hold."""

    _is_plain = True
