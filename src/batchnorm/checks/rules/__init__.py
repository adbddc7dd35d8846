"""The rules of `batchnorm.check`, one file each."""
