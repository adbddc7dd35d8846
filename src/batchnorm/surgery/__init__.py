"""Operations that change which layers a network has."""

from batchnorm.surgery._fold import fold
from batchnorm.surgery._fuse import fuse
from batchnorm.surgery._insert import insert
from batchnorm.surgery._remove import remove

__all__ = ["fold", "fuse", "insert", "remove"]
