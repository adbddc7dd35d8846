"""Compiled kernels, a folder a device. Nothing here chooses: `batchnorm.ops` does."""
