import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import batchnorm
from batchnorm import InputError, InputTypeError, OutputError
from batchnorm.report import terminal
from batchnorm.report.document import Figure, Formula


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 3, 2), (4, 3, 2, 5)], ids=str)
def test_the_steps_are_those_of_torch(shape: tuple[int, ...]) -> None:
    x = 50 + 4 * torch.randn(shape, dtype=torch.float64)
    channels = 1 if len(shape) == 1 else shape[1]
    weight, bias = torch.randn(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    found = batchnorm.trace(x, weight, bias, eps=0.5)
    view = x.unsqueeze(1) if x.dim() == 1 else x
    axes = [axis for axis in range(view.dim()) if axis != 1]
    torch.testing.assert_close(found.mean, view.mean(axes))
    torch.testing.assert_close(found.var, view.var(axes, correction=0))
    normalized = torch.nn.functional.batch_norm(view, None, None, training=True, eps=0.5)
    torch.testing.assert_close(found.xhat, normalized.reshape(shape))
    y = torch.nn.functional.batch_norm(view, None, None, weight, bias, training=True, eps=0.5)
    torch.testing.assert_close(found.y, y.reshape(shape))
    assert found.count == view[:, 0].numel()
    assert found.x.shape == found.y.shape == shape


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor], ids=["list", "array", "tensor"])
def test_lists_arrays_and_tensors_are_one(kind: Callable[[Any], Any]) -> None:
    found = batchnorm.trace(kind([1, 2, 6]))
    assert (found.mean.item(), found.count) == (3.0, 3)
    assert found.y.dtype == torch.float64


def test_weight_and_bias_may_be_one_number_or_one_a_channel() -> None:
    x = [[1.0, 2.0], [3.0, 8.0]]
    found = batchnorm.trace(x, weight=2, bias=[10, 20])
    assert found.weight.tolist() == [2, 2]
    torch.testing.assert_close(found.y, 2 * found.xhat + torch.tensor([10.0, 20.0]))


def test_a_trace_keeps_what_it_was_given() -> None:
    x = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    found = batchnorm.trace(x)
    with torch.no_grad():
        x += 1
    assert found.x.tolist() == [1, 3]
    assert not found.y.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.eps = 1.0  # type: ignore[misc]


def test_print_shows_formulas_and_numbers_of_every_step() -> None:
    text = str(batchnorm.trace([[81.0, 1.0], [84.0, 2.0], [93.0, 6.0]]))
    assert [text.count(f"  {step}. ") for step in (1, 2, 3, 4)] == [2, 2, 2, 2]
    for part in (
        "μ = Σx / n            = 86",
        "= 26",
        "−0.98058, −0.392232, 1.37281",
        "= 4.66667",
        "channel 1",
    ):
        assert part in text


def test_many_channels_are_cut_short_and_say_so() -> None:
    found = batchnorm.trace(torch.randn(300, 40))
    assert "... and 34 more channels" in str(found)
    figures = [
        block
        for section in found.document().sections
        for block in section.blocks
        if isinstance(block, Figure)
    ]
    assert all(len(trace["x"]) <= 200 for figure in figures for trace in figure.data)
    assert "28 more" in found.document().sections[0].blocks[0].caption  # type: ignore[union-attr]


def test_the_document_has_formula_numbers_and_picture_of_each_step() -> None:
    sections = batchnorm.trace([81, 84, 93]).document().sections
    assert [section.title for section in sections] == [
        "The batch",
        "Step 1: the mean",
        "Step 2: the variance",
        "Step 3: normalize",
        "Step 4: scale and shift",
    ]
    for section in sections[1:]:
        kinds = {type(block) for block in section.blocks}
        assert {Formula, Figure} <= kinds
    console = Console(width=80)
    with console.capture() as drawn:
        console.print(terminal.render_section(sections[2]))
    assert "((81 − 86)² + (84 − 86)² + (93 − 86)²) / 3 = 26" in drawn.get()
    assert re.search("▁.*█", drawn.get())


def test_each_step_draws_what_it_is_about() -> None:
    console = Console(width=80)
    bars = []
    for section in batchnorm.trace([9.1, 9.4, 12.0]).document().sections[1:3]:
        with console.capture() as drawn:
            console.print(terminal.render_section(section))
        bars.append(next(line.split()[2] for line in drawn.get().splitlines() if "█" in line))
        assert "left to right, place in the batch: 1 to 3" in drawn.get()
    assert bars == ["▁▂█", "▂▁█"]  # the values, and their squared distances from the mean
    squares, level = (
        trace["y"]
        for trace in batchnorm.trace([[1.0, 0], [3, 9]]).document().sections[2].blocks[2].data[1::-1]  # type: ignore[union-attr]
    )
    assert (squares, level) == ([1, 1], [1, 1])


def test_equal_values_become_the_bias() -> None:
    found = batchnorm.trace([100.1] * 5, bias=3)
    assert found.y.tolist() == [3.0] * 5
    assert "spread 0 after" in found.document().verdict


def words_of_step_three(values: Any, **options: Any) -> str:
    paragraph = batchnorm.trace(values, **options).document().sections[3].blocks[0]
    return str(paragraph.text)  # type: ignore[union-attr]


def test_step_three_says_what_became_of_the_spread() -> None:
    assert "Now the mean is 0 and the spread 1" in words_of_step_three([1, 2, 6])
    constant = words_of_step_three([5, 5, 5])
    assert "spread 1" not in constant
    assert "values are all equal: each of them becomes 0, the spread stays 0" in constant
    small = [1e-4, 2e-4, 3e-4]
    assert "spread is 0.0258, not 1, because ε = 1e-05 counts beside a variance of" in words_of_step_three(
        small
    )
    assert "spread 0.0258 after" in batchnorm.trace(small).document().verdict
    assert "Now the mean is 0 and the spread 1" in words_of_step_three(small, eps=1e-15)


def test_step_three_names_the_channels_whose_spread_is_not_one() -> None:
    some = words_of_step_three([[1.0, 5, 1e-4], [2, 5, 2e-4], [3, 5, 3e-4]])
    assert "the spread 1, with exceptions. In channel 1 the values are all equal" in some
    assert "In channel 2 the spread is 0.0258, not 1" in some
    assert "channel 0" not in some.replace("The numbers are those of channel 0.", "")
    every = words_of_step_three(torch.zeros(2, 7, 4))
    assert "no spread is 1" in every
    assert "In 4 more channels the spread is not 1 either" in every
    assert "channel 3" not in every


def test_numbers_in_a_list_keep_all_their_digits() -> None:
    assert batchnorm.trace([1e9, 1e9 + 1, 1e9 + 2]).var.item() == pytest.approx(2 / 3)
    assert batchnorm.trace([0.1, 0.3]).x.tolist() == [0.1, 0.3]
    assert batchnorm.trace(np.float32([0.1, 0.3])).x[0].item() == float(np.float32(0.1))


def test_json_holds_everything(tmp_path: Path) -> None:
    found = batchnorm.trace([[1, 2], [3, 8]], weight=2, eps=0.25)
    content = json.loads(found.to_json())
    assert (content["kind"], content["schema_version"]) == ("trace", 1)
    assert content["shape"] == [2, 2]
    assert content["mean"] == [2, 5]
    assert content["var"] == [1, 9]
    assert content["y"] == found.y.tolist()
    assert set(content) == {
        *("kind", "schema_version", "shape", "count", "eps", "names"),
        *("x", "mean", "var", "xhat", "y", "weight", "bias"),
    }
    assert json.loads(found.save(tmp_path / "t.json").read_text("utf-8")) == content


def test_save_writes_a_page_and_refuses_other_names(tmp_path: Path) -> None:
    found = batchnorm.trace([1, 2, 6])
    assert "Step 3: normalize" in found.save(tmp_path / "t.html").read_text("utf-8")
    with pytest.raises(InputError, match=r"ends in \.html or \.json"):
        found.save(tmp_path / "t.txt")
    with pytest.raises(OutputError):
        found.save(tmp_path / "no" / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t.html"]
    assert "σ² = Σ(x − μ)² / n" in found._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(input=[1.0]), InputError, r"\(1,\), 1 value in 1 channel, expected at least two values"),
        (dict(input=[[1.0, 2.0]]), InputError, "1 value in 2 channels"),
        (dict(input=[]), InputError, "0 values"),
        (dict(input=torch.ones(3, 0)), InputError, "0 channels"),
        (dict(input=3.0), InputError, "a single number"),
        (dict(input=[1.0, float("nan")]), InputError, "1 value that is NaN or infinite"),
        (dict(input=[1.0, float("inf"), float("nan")]), InputError, "2 values that are NaN"),
        (dict(input=[1, 2j]), InputTypeError, "complex"),
        (dict(input=[True, False]), InputTypeError, "bool"),
        (dict(input=[[1, 2], [3]]), InputTypeError, "a list of 2, expected an array of real numbers"),
        (dict(input="12"), InputTypeError, "a str"),
        (dict(input=[1, 2], eps=0), InputError, "eps: got 0"),
        (dict(input=[1, 2], eps=float("nan")), InputError, "eps: got nan"),
        (dict(input=[1, 2], eps="small"), InputTypeError, "eps: got str"),
        (dict(input=[1, 2], weight=[1, 2]), InputError, r"weight: got shape \(2,\), expected one number"),
        (dict(input=[1, 2], bias=float("inf")), InputError, "bias: got 1 value"),
    ],
)
def test_bad_input_says_what_came_and_what_was_expected(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        batchnorm.trace(**arguments)
    assert "expected" in str(raised.value)
    assert "\n" not in str(raised.value)
