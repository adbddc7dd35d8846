"""The figures that follow from times: percentiles, means, counted bytes, groups, words."""

import math

import pytest
from bench_helpers import make_case, make_record

from batchnorm.bench.case import SIZES, counted_tensors
from batchnorm.bench.statistics import geometric_mean, median, percentile
from batchnorm.bench.summary import groups, totals
from batchnorm.bench.wording import exponent, seconds, spread


def test_percentiles_are_interpolated() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx(
        [1, 1.8, 3, 4.2, 5]
    )
    assert percentile([7.0], 0.2) == 7
    assert median([1.0, 2.0, 4.0, 8.0]) == 3


def test_a_geometric_mean_is_weighted_and_its_inverse_is_the_mean_of_inverses() -> None:
    pairs = [(2.0, 3.0), (0.25, 1.0), (1.5, 2.0)]
    mean = geometric_mean(pairs)
    assert mean == pytest.approx((2.0**3 * 0.25 * 1.5**2) ** (1 / 6))
    assert geometric_mean([(1 / value, weight) for value, weight in pairs]) == pytest.approx(1 / mean)


@pytest.mark.parametrize(
    ("epilogue", "forward", "training", "inference"),
    [("none", 3, 8, 2), ("relu", 3, 8, 2), ("residual", 4, 9, 3), ("residual+relu", 4, 10, 3)],
)
def test_the_bytes_that_are_counted(epilogue: str, forward: int, training: int, inference: int) -> None:
    counted = [
        counted_tensors(operation, epilogue) for operation in ("forward", "forward+backward", "inference")
    ]
    assert counted == [forward, training, inference]


def test_a_record_gives_ratio_speed_and_share() -> None:
    record = make_record(0.002, 0.003)
    assert record.ratio("forward+backward", "eager") == pytest.approx(1.5)
    assert record.ratio("forward+backward", "compile") is None
    size = 16 * 64 * 56 * 56 * 4
    assert record.case.bytes == size
    assert record.speed("forward+backward") == pytest.approx(8 * size / 0.002)
    assert record.error("eager") == 8.6e-6
    plain = record.to_dict(copy=30e9)["operations"]["inference"]
    assert plain["share_of_copy"]["batchnorm"] == pytest.approx(2 * size / 0.002 / 30e9)


def test_groups_weigh_each_shape_by_its_count_and_name_the_worst() -> None:
    records = [
        make_record(0.001, 0.004, count=3),
        make_record(0.002, 0.001, count=1, shape=(16, 512, 28, 28)),
        make_record(0.001, 0.009, count=2, epilogue="residual+relu"),
    ]
    found = {
        (group.epilogue, group.larger_than): group
        for group in groups(records, 30e9)
        if group.operation == "forward+backward"
    }
    relu = found["relu", 0]
    assert relu.ratio == pytest.approx((4**3 * 0.5) ** 0.25)
    assert (relu.worst, relu.worst_shape, relu.shapes, relu.norms) == (0.5, "16×512×28²", 2, 4)
    assert relu.seconds == pytest.approx(3 * 0.001 + 0.002)
    assert found["all", 0].norms == 6
    assert found["relu", 16_000_000].shapes == 1  # 25.7 MB
    assert ("relu", 32_000_000) not in found
    assert not [g for g in groups(records, 30e9) if g.larger_than and g.operation != "forward+backward"]


def test_sums_count_each_shape_as_often_as_it_occurs() -> None:
    records = [
        make_record(0.001, 0.004, count=3),
        make_record(0.002, 0.001, count=1, shape=(16, 512, 28, 28)),
        make_record(0.001, 0.009, count=2, epilogue="residual+relu"),
        make_record(0.5, 0.5, layout="channels-last"),
    ]
    found = {(total.operation, total.layout): total for total in totals(records, (), ("eager", "compile"))}
    total = found["forward+backward", "contiguous"]
    assert (total.norms, total.epilogue) == (6, "all")
    assert total.seconds == {
        "batchnorm": pytest.approx(0.007),
        "eager": pytest.approx(0.031),
        "compile": None,
    }
    plane = 16 * 64 * 56 * 56 * 4
    assert total.counted == 3 * 8 * plane + 8 * 16 * 512 * 28 * 28 * 4 + 2 * 10 * plane
    assert found["inference", "channels-last"].norms == 6
    split = totals(records, ("relu", "residual+relu"), ("eager",))
    assert [(each.epilogue, each.norms) for each in split if each.operation == "forward"][:2] == [
        ("relu", 4),
        ("residual+relu", 2),
    ]


def test_labels() -> None:
    assert make_case().label == "16×64×56²"
    assert make_case(shape=(1, 32, 64, 64, 64)).label == "1×32×64³"
    assert make_case(shape=(4, 8)).label == "4×8"
    assert make_case(shape=(2, 3, 4, 5)).label == "2×3×4×5"
    assert make_case(dtype="bfloat16").bytes * 2 == make_case().bytes
    assert set(SIZES) == {"float32", "float64", "bfloat16", "float16"}


def test_numbers_in_words() -> None:
    assert [seconds(value) for value in (4.567e-5, 0.0123, 0.999, 12.0)] == [
        "45.7 µs",
        "12.3 ms",
        "999 ms",
        "12.0 s",
    ]
    assert spread(make_record(0.002, 0.003).times["forward"]["batchnorm"]) == "2.00 (1.80–2.40) ms"
    assert [exponent(value) for value in (1.25e-7, 0.0, None, math.nan)] == ["1.2e-7", "0", "–", "NaN"]
