"""`fold` on ONNX models: the same numbers in float64, a valid model, and what must be left alone."""

import numpy as np
import pytest
from onnx_models import (
    RANDOM,
    constants_of,
    count,
    helper,
    model,
    node,
    norm,
    numpy_helper,
    onnx,
    run,
    statistics,
)
from surgery_helpers import notes, reasons

import batchnorm


def check(made, x: np.ndarray, *, left: int = 0) -> batchnorm.Changes:
    """The folded model is valid, gives what the model gave, holds nothing that is not read; the model is as it was."""
    before = made.SerializeToString()
    changes = batchnorm.fold(made, x)
    folded = changes.model
    onnx.checker.check_model(folded, full_check=True)
    assert count(folded) == left == len(changes.skipped)
    assert len(changes.changed) == count(made) - left
    for old, new in zip(run(made, x), run(folded, x), strict=True):
        assert old.dtype == new.dtype
        bound = 1e-11 if x.dtype == np.float64 else 1e-5
        np.testing.assert_allclose(new, old, rtol=bound, atol=bound)
    read = {name for each in folded.graph.node for name in each.input}
    assert set(constants_of(folded)) <= read
    assert [each.name for each in folded.graph.output] == [each.name for each in made.graph.output]
    assert made.SerializeToString() == before
    assert changes.revert() is made
    return batchnorm.fold(made)


def conv(
    width: int = 4, depth: int = 3, size: int = 3, bias: bool = False, groups: int = 1
) -> dict[str, np.ndarray]:
    found = {"w": RANDOM.normal(size=(width, depth // groups, size, size))}
    return found | ({"b": RANDOM.normal(size=width)} if bias else {})


X = RANDOM.normal(size=(2, 3, 6, 6))


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 14, 15, 17, 21])
@pytest.mark.parametrize("bias", [False, True])
def test_behind_a_convolution(opset: int, bias: bool) -> None:
    nodes = [
        node("Conv", "x w b" if bias else "x w", "c", pads=[1, 1, 1, 1]),
        norm("c", "n"),
        node("Relu", "n", "y"),
    ]
    # Before operator set 14 onnx's reference takes the batch's statistics.
    x = X if opset >= 14 else X.astype(np.float32)
    constants, ir = conv(bias=bias) | statistics(4), 3 if opset < 9 else 8
    made = model(nodes, constants, X.shape, opset=opset, ir=ir, dtype=x.dtype.name)
    changes = check(made, x)
    assert notes(changes) == {"bn": "folded into c" + ("" if bias else ", which has a bias now")}
    assert sorted(constants_of(changes.model)) == ["b", "w"] if bias else ["w", "w_bias"]
    assert len(changes.model.graph.input) == (3 if opset < 9 else 1)


def test_an_old_model_in_float64() -> None:
    constants = {"w": np.eye(3).reshape(3, 3, 1, 1)} | statistics(3)
    made = model([node("Conv", "x w", "c"), norm("c", "y", epsilon=0.25)], constants, X.shape, opset=9)
    changes = batchnorm.fold(made, X)
    scale, bias, mean, var = (each.reshape(3, 1, 1) for each in list(constants.values())[1:])
    (y,) = run(changes.model, X)
    np.testing.assert_allclose(y, scale * (X - mean) / np.sqrt(var + 0.25) + bias, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("empty", ["x w ", "x w"])
def test_a_bias_that_is_left_out(empty: str) -> None:
    made = model([node("Conv", empty, "c"), norm("c", "y", epsilon=0.2)], conv() | statistics(4), X.shape)
    check(made, X)


@pytest.mark.parametrize("groups", [1, 3])
def test_behind_a_transposed_convolution(groups: int) -> None:
    constants = {"w": RANDOM.normal(size=(3, 2, 2, 2))} | statistics(2 * groups)
    nodes = [node("ConvTranspose", "x w", "c", group=groups, strides=[2, 2]), norm("c", "y")]
    # onnx's reference runs groups of a transposed convolution wrongly, onnxruntime none in float64.
    x = X if groups == 1 else X.astype(np.float32)
    check(model(nodes, constants, X.shape, dtype=x.dtype.name), x)


def test_one_and_three_axes() -> None:
    constants = {"w": RANDOM.normal(size=(4, 3, 2))} | statistics(4)
    check(model([node("Conv", "x w", "c"), norm("c", "y")], constants, (2, 3, 6)), X[..., 0])
    constants = {"w": RANDOM.normal(size=(4, 3, 2, 1, 2))} | statistics(4)
    x = RANDOM.normal(size=(2, 3, 3, 3, 3))
    check(model([node("Conv", "x w", "c"), norm("c", "y")], constants, x.shape), x)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1,)])
@pytest.mark.parametrize("behind", [True, False])
def test_gemm(transposed: int, bias: tuple[int, ...] | None, behind: bool) -> None:
    x = RANDOM.normal(size=(4, 3))
    constants = {"w": RANDOM.normal(size=(5, 3) if transposed else (3, 5))} | statistics(5 if behind else 3)
    inputs = "w"
    if bias is not None:
        constants["b"] = RANDOM.normal(size=bias)
        inputs += " b"
    options = {"transB": transposed, "alpha": 0.5, "beta": -2.0}
    if behind:
        nodes = [node("Gemm", f"x {inputs}", "g", **options), norm("g", "y")]
    else:
        nodes = [norm("x", "g"), node("Gemm", f"g {inputs}", "y", **options)]
    check(model(nodes, constants, ("n", 3)), x)


@pytest.mark.parametrize("add", ["m b", "b m", ""])
@pytest.mark.parametrize("behind", [True, False])
def test_matrix_product(add: str, behind: bool) -> None:
    x = RANDOM.normal(size=(4, 3))
    constants = {"w": RANDOM.normal(size=(3, 5))} | statistics(5 if behind else 3)
    start = "x" if behind else "n"
    nodes = [] if behind else [norm("x", "n")]
    end = "a" if behind else "y"
    if add:
        constants["b"] = RANDOM.normal(size=5)
        nodes += [node("MatMul", f"{start} w", "m"), node("Add", add, end)]
    else:
        nodes += [node("MatMul", f"{start} w", end, name="m")]
    nodes += [norm("a", "y")] if behind else []
    changes = check(model(nodes, constants, (4, 3)), x)
    gained = "" if add else ", which has a bias now"
    assert notes(changes) == {"bn": f"folded into m{gained}"}
    assert count(changes.model, "Add") == 1


def test_a_product_with_more_axes_stays() -> None:
    x = RANDOM.normal(size=(2, 5, 3))
    constants = {"w": RANDOM.normal(size=(3, 5))} | statistics(5)
    nodes = [node("MatMul", "x w", "m"), norm("m", "y")]
    changes = check(model(nodes, constants, x.shape), x, left=1)
    assert "its channels lie on another axis" in reasons(changes)["bn"]
    made = model(nodes, constants, x.shape)
    made.graph.input[0].type.tensor_type.ClearField("shape")
    assert "whether its input has two axes is not known" in reasons(batchnorm.fold(made))["bn"]


def test_before_a_convolution() -> None:
    nodes = [node("Tanh", "x", "t"), norm("t", "n"), node("Conv", "n w b", "y")]
    check(model(nodes, conv(bias=True) | statistics(3), X.shape), X)
    nodes[2] = node("Conv", "n w b", "y", auto_pad="VALID")
    check(model(nodes, conv(bias=True) | statistics(3), X.shape), X)
    nodes[2] = node("ConvTranspose", "n w", "y")
    check(model(nodes, {"w": RANDOM.normal(size=(3, 2, 1, 1))} | statistics(3), X.shape), X)


@pytest.mark.parametrize(
    ("kind", "size", "attributes"),
    [
        ("Conv", 3, {"pads": [1, 1, 1, 1]}),
        ("Conv", 3, {"pads": [0, 0, 0, 1]}),
        ("Conv", 3, {"auto_pad": "SAME_UPPER"}),
        ("ConvTranspose", 3, {}),
        ("ConvTranspose", 1, {"strides": [2, 2]}),
        ("ConvTranspose", 1, {"output_shape": [8, 8], "strides": [1, 1]}),
    ],
)
def test_padding_keeps_a_shift_out_but_not_a_scale(kind: str, size: int, attributes: dict) -> None:
    nodes = [node("Tanh", "x", "t"), norm("t", "n"), node(kind, "n w", "y", **attributes)]
    constants = {"w": RANDOM.normal(size=(3, 3, size, size))} | statistics(3)
    changes = batchnorm.fold(model(nodes, constants, X.shape))
    assert "cannot take its shift" in reasons(changes)["bn"]
    zero = {"bn_B": np.zeros(3), "bn_mean": np.zeros(3)}
    assert len(batchnorm.fold(model(nodes, constants | zero, X.shape)).changed) == 1


def test_a_chain_goes_into_one_layer() -> None:
    nodes = [
        node("Conv", "x w", "c"),
        node("Identity", "c", "i"),
        norm("i", "n"),
        node("Dropout", "n", "d"),
        norm("d", "y", "bn2"),
        node("Relu", "y", "z"),
    ]
    made = model(nodes, conv() | statistics(4) | statistics(4, "bn2"), X.shape, outputs=("y", "z"))
    check(made, X)


def test_one_before_several_layers_and_one_behind() -> None:
    nodes = [
        node("Conv", "x w b", "c"),
        node("Tanh", "c", "t"),
        norm("t", "n"),
        node("Identity", "n", "i"),
        node("Conv", "i w2", "y"),
        node("ConvTranspose", "n w3", "u"),
        norm("u", "z", "bn2"),
    ]
    constants = conv(bias=True) | statistics(4) | statistics(5, "bn2")
    constants |= {"w2": RANDOM.normal(size=(2, 4, 2, 2)), "w3": RANDOM.normal(size=(4, 5, 1, 1))}
    changes = check(model(nodes, constants, X.shape, outputs=("y", "z")), X)
    assert notes(changes)["bn"] == "folded into y, which has a bias now and u, which has a bias now"


def test_initializers_that_others_read() -> None:
    """Statistics and biases may be shared; a weight that another layer has, too, stays."""
    nodes = [
        node("Conv", "x w b", "c"),
        norm("c", "n"),
        node("Conv", "x w2 b", "d"),
        helper.make_node(
            "BatchNormalization", ["d", "bn_scale", "b", "bn_mean", "bn_var"], ["m"], name="bn2"
        ),
        node("Add", "n m", "y"),
    ]
    constants = conv(bias=True) | statistics(4) | {"w2": RANDOM.normal(size=(4, 3, 3, 3))}
    changes = check(model(nodes, constants, X.shape), X)
    assert sorted(constants_of(changes.model)) == ["w", "w2", "w2_folded", "w_folded"]
    nodes[2] = node("Conv", "x w b", "d")
    del constants["w2"]
    changes = check(model(nodes, constants, X.shape), X, left=2)
    assert "its weight is used elsewhere, too" in reasons(changes)["bn"]


def test_constant_nodes() -> None:
    constants = conv()
    held = numpy_helper.from_array(constants.pop("w"), "")
    nodes = [node("Constant", "", "w", value=held), node("Conv", "x w", "c"), norm("c", "y")]
    nodes[0].ClearField("input")
    changes = check(model(nodes, statistics(4), X.shape), X)
    assert count(changes.model, "Constant") == 0


def test_weights_that_are_no_constants_stay() -> None:
    nodes = [node("Neg", "w", "v"), node("Conv", "x v", "c"), norm("c", "y")]
    changes = check(model(nodes, conv() | statistics(4), X.shape), X, left=1)
    assert "no initializers, or a caller may override them" in reasons(changes)["bn"]
    made = model([node("Conv", "x w", "c"), norm("c", "y")], conv() | statistics(4), X.shape)
    for name in ("w", "bn_var"):
        over = onnx.ModelProto()
        over.CopyFrom(made)
        held = next(each for each in made.graph.initializer if each.name == name)
        over.graph.input.append(helper.make_tensor_value_info(name, held.data_type, held.dims))
        assert "a caller may override them" in reasons(batchnorm.fold(over))["bn"]


def test_outputs_of_the_model_keep_their_values() -> None:
    nodes = [node("Conv", "x w", "c"), norm("c", "y")]
    made = model(nodes, conv() | statistics(4), X.shape, outputs=("y", "c"))
    changes = check(made, X, left=1)
    assert (
        reasons(changes)["bn"]
        == "the output of Conv (c) goes elsewhere, too; an output of the model comes after it"
    )
    nodes = [node("Tanh", "x", "t"), norm("t", "y"), node("Conv", "y w", "z")]
    check(model(nodes, conv() | statistics(3), X.shape, outputs=("y", "z")), X, left=1)


def test_training_mode_stays() -> None:
    nodes = [node("Conv", "x w", "c"), norm("c", "y", more=("m", "v"), training_mode=1)]
    changes = batchnorm.fold(model(nodes, conv() | statistics(4), X.shape))
    assert "training mode" in reasons(changes)["bn"]
    nodes = [node("Conv", "x w", "c"), norm("c", "y", more=("m", "v", "sm", "sv"))]
    changes = batchnorm.fold(model(nodes, conv() | statistics(4), X.shape, opset=9))
    assert "training mode" in reasons(changes)["bn"]
    nodes = [node("Conv", "x w", "c"), norm("c", "y", spatial=0)]
    assert (
        "spatial=0" in reasons(batchnorm.fold(model(nodes, conv() | statistics(4), X.shape, opset=7)))["bn"]
    )


def test_a_branch_stays_and_what_it_reads_too() -> None:
    inner = helper.make_graph(
        [norm("c", "b1")], "then", [], [helper.make_tensor_value_info("b1", onnx.TensorProto.DOUBLE, None)]
    )
    other = helper.make_graph(
        [node("Neg", "n", "b2")],
        "else",
        [],
        [helper.make_tensor_value_info("b2", onnx.TensorProto.DOUBLE, None)],
    )
    nodes = [
        node("Conv", "x w", "c"),
        norm("c", "n", "out"),
        helper.make_node("If", ["yes"], ["y"], name="if", then_branch=inner, else_branch=other),
    ]
    constants = conv() | statistics(4) | statistics(4, "out") | {"yes": np.array(True)}
    made = model(nodes, constants, X.shape)
    changes = batchnorm.fold(made, X)
    assert reasons(changes) == {
        "out": "the output of Conv (c) goes elsewhere, too; If comes after it",
        "bn": "it stands in a graph of If (if)",
    }


def test_a_branch_that_reads_what_is_folded() -> None:
    one = helper.make_tensor_value_info("b1", onnx.TensorProto.DOUBLE, None)
    two = helper.make_tensor_value_info("b2", onnx.TensorProto.DOUBLE, None)
    nodes = [
        node("Conv", "x w", "c"),
        norm("c", "n"),
        helper.make_node(
            "If",
            ["yes"],
            ["y"],
            then_branch=helper.make_graph([node("Neg", "n", "b1")], "then", [], [one]),
            else_branch=helper.make_graph([node("Abs", "n", "b2")], "else", [], [two]),
        ),
    ]
    check(model(nodes, conv() | statistics(4) | {"yes": np.array(True)}, X.shape), X)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_rounded_once(dtype: str) -> None:
    nodes = [node("Conv", "x w b", "c"), norm("c", "y")]
    made = model(nodes, conv(bias=True) | statistics(4), X.shape, dtype=dtype)
    old = {name: value.astype(np.float64) for name, value in constants_of(made).items()}
    new = constants_of(batchnorm.fold(made, X.astype(dtype)).model)
    scale = old["bn_scale"] / np.sqrt(old["bn_var"] + np.float64(np.float32(1e-5)))
    np.testing.assert_array_equal(new["w"], (old["w"] * scale.reshape(-1, 1, 1, 1)).astype(dtype))
    np.testing.assert_array_equal(new["b"], ((old["b"] - old["bn_mean"]) * scale + old["bn_B"]).astype(dtype))


def test_numbers_that_do_not_fit_stay() -> None:
    constants = conv() | statistics(4) | {"bn_scale": np.full(4, 6e4), "bn_var": np.full(4, 1e-7)}
    made = model([node("Conv", "x w", "c"), norm("c", "y")], constants, X.shape, dtype="float16")
    assert "does not fit its dtype" in reasons(batchnorm.fold(made))["bn"]


def test_two_in_a_row_without_a_layer_stay() -> None:
    nodes = [node("Tanh", "x", "t"), norm("t", "n"), norm("n", "y", "bn2")]
    check(model(nodes, statistics(3) | statistics(3, "bn2"), X.shape), X, left=2)


def test_other_domains_are_not_ours() -> None:
    nodes = [node("Conv", "x w", "c"), norm("c", "y")]
    nodes[0].domain = "com.example"
    made = model(nodes, conv() | statistics(4), X.shape, check=False)
    made.opset_import.append(helper.make_opsetid("com.example", 1))
    assert "no convolution or linear layer comes before it" in reasons(batchnorm.fold(made))["bn"]


def test_bad_input() -> None:
    made = model([norm("x", "y")], statistics(3), X.shape)
    with pytest.raises(batchnorm.ModelError, match="on the example"):
        batchnorm.fold(made, X.astype(np.float32)[:, :2])
    with pytest.raises(batchnorm.ModelError, match=r"got 2 inputs, expected 1 \(x\)"):
        batchnorm.fold(made, (X, X))
    made.opset_import[0].version = 6
    with pytest.raises(batchnorm.ModelError, match="got 6, expected 7 or newer"):
        batchnorm.fold(made)


def test_an_example_that_shows_a_wrong_fold_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model([node("Conv", "x w", "c"), norm("c", "y")], conv() | statistics(4), X.shape)
    right = batchnorm.surgery._folding.Weights.then

    def wrong(self, given):
        new = right(self, given)
        new.bias = new.bias + 0.01
        return new

    monkeypatch.setattr(batchnorm.surgery._folding.Weights, "then", wrong)
    with pytest.raises(batchnorm.ModelError, match="what the model gives without the change"):
        batchnorm.fold(made, {"x": X})
