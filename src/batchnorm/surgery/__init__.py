"""Operations that change which layers a network has, or what they are."""

from batchnorm.surgery._absorb import absorb_bias
from batchnorm.surgery._convert import convert
from batchnorm.surgery._fold import fold
from batchnorm.surgery._freeze import freeze, unfreeze
from batchnorm.surgery._fuse import fuse
from batchnorm.surgery._insert import insert
from batchnorm.surgery._remove import remove

__all__ = ["absorb_bias", "convert", "fold", "freeze", "fuse", "insert", "remove", "unfreeze"]
