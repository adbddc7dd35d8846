"""The inputs of batch norm in real networks, as frozen data: what a suite measures, and how often each shape occurs."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["EPILOGUES", "SUITES", "Epilogue", "Norm", "Suite"]


@dataclass(frozen=True)
class Epilogue:
    """What follows a batch norm: an addition, an activation, both or nothing."""

    activation: str | None
    residual: bool


EPILOGUES = {
    "none": Epilogue(None, False),
    "relu": Epilogue("relu", False),
    "relu6": Epilogue("relu6", False),
    "residual": Epilogue(None, True),
    "residual+relu": Epilogue("relu", True),
}


@dataclass(frozen=True)
class Norm:
    """`count` batch norms of one network over (N, channels, *size) that the same epilogue follows.

    `batch` is N where it belongs to the shape and is no choice of the user's.
    """

    channels: int
    size: tuple[int, ...]
    epilogue: str
    count: int = 1
    batch: int | None = None

    def shape(self, batch: int) -> tuple[int, ...]:
        """The input's shape at a batch size."""
        return (self.batch or batch, self.channels, *self.size)


@dataclass(frozen=True)
class Suite:
    """A network's batch norms.

    Args:
        name: as the command line spells it.
        title: as a reader knows it.
        source: where the shapes come from.
        norms: them, from the input to the output.
        cpu_batch: N on a CPU, unless the user says otherwise.
        cuda_batch: N on a GPU.
        threads: of the CPU, where the suite is about a given number.
    """

    name: str
    title: str
    source: str
    norms: tuple[Norm, ...]
    cpu_batch: int
    cuda_batch: int
    threads: int | None = None

    @property
    def count(self) -> int:
        """How many batch norms the network has."""
        return sum(norm.count for norm in self.norms)


def _square(size: int) -> tuple[int, int]:
    return size, size


def _cube(size: int) -> tuple[int, int, int]:
    return size, size, size


def _merged(norms: Iterator[Norm]) -> tuple[Norm, ...]:
    """Equal ones counted, in the order of their first appearance."""
    counts = Counter((norm.channels, norm.size, norm.epilogue) for norm in norms)
    return tuple(Norm(*key, count) for key, count in counts.items())


def _resnet50() -> Iterator[Norm]:
    """The stem, then bottlenecks 1×1, 3×3 (with the stage's stride), 1×1; the addition comes before the last ReLU."""
    yield Norm(64, _square(112), "relu")
    before = 56
    for width, blocks, size in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(blocks):
            yield Norm(width, _square(before), "relu")
            yield Norm(width, _square(size), "relu")
            yield Norm(4 * width, _square(size), "residual+relu")
            if block == 0:
                yield Norm(4 * width, _square(size), "none")  # of the shortcut
            before = size


def _mobilenet_v2() -> Iterator[Norm]:
    """Inverted residuals: expand, depthwise, project; the projection has no activation, and may have a shortcut."""
    yield Norm(32, _square(112), "relu6")
    channels, size = 32, 112
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, width, blocks, first_stride in stages:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            if expansion != 1:
                yield Norm(channels * expansion, _square(size), "relu6")
            yield Norm(channels * expansion, _square(size // stride), "relu6")
            shortcut = stride == 1 and channels == width
            channels, size = width, size // stride
            yield Norm(width, _square(size), "residual" if shortcut else "none")
    yield Norm(1280, _square(size), "relu6")


def _densenet121() -> Iterator[Norm]:
    """Batch norm, ReLU, convolution: each layer of a block normalizes everything before it, then 4 · 32 channels."""
    yield Norm(64, _square(112), "relu")
    channels, size = 64, 56
    for block, layers in enumerate((6, 12, 24, 16)):
        for _ in range(layers):
            yield Norm(channels, _square(size), "relu")
            yield Norm(128, _square(size), "relu")
            channels += 32
        if block < 3:
            yield Norm(channels, _square(size), "relu")  # of the transition, which halves channels and size
            channels, size = channels // 2, size // 2
    yield Norm(channels, _square(size), "relu")


def _unet3d() -> Iterator[Norm]:
    """Two convolutions a level; the way up sees the way down's channels beside its own."""
    down = ((32, 64, 64), (64, 128, 32), (128, 256, 16), (256, 512, 8))
    for first, second, size in down:
        yield Norm(first, _cube(size), "relu")
        yield Norm(second, _cube(size), "relu")
    for channels, size in ((256, 16), (128, 32), (64, 64)):
        yield Norm(channels, _cube(size), "relu")
        yield Norm(channels, _cube(size), "relu")


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "resnet50",
            "ResNet-50",
            "He et al. 2015, images of 224×224, the stride in the 3×3 convolution",
            _merged(_resnet50()),
            cpu_batch=16,
            cuda_batch=128,
        ),
        Suite(
            "mobilenet_v2",
            "MobileNetV2",
            "Sandler et al. 2018, images of 224×224",
            _merged(_mobilenet_v2()),
            cpu_batch=16,
            cuda_batch=128,
        ),
        Suite(
            "densenet121",
            "DenseNet-121",
            "Huang et al. 2016, images of 224×224",
            _merged(_densenet121()),
            cpu_batch=8,
            cuda_batch=128,
        ),
        Suite(
            "unet3d",
            "3-D U-Net",
            "Çiçek et al. 2016 with same padding, patches of 64×64×64",
            _merged(_unet3d()),
            cpu_batch=1,
            cuda_batch=8,
        ),
        Suite(
            "tabular",
            "Tabular network",
            "columns normalized at the input, then five hidden layers",
            (
                Norm(64, (), "none"),
                Norm(512, (), "relu", 2),
                Norm(256, (), "relu", 2),
                Norm(128, (), "relu", 1),
            ),
            cpu_batch=4096,
            cuda_batch=65536,
        ),
        Suite(
            "tiny",
            "Tiny layers",
            "what a call costs beside its arithmetic, on one thread",
            tuple(
                Norm(channels, (), epilogue, batch=batch)
                for batch, channels in ((4, 8), (32, 64))
                for epilogue in ("none", "relu")
            ),
            cpu_batch=4,
            cuda_batch=4,
            threads=1,
        ),
    )
}
