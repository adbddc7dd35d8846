"""`from_framework` and `to_framework` on arrays: known numbers, names, errors, and that nothing is lost on the way."""

import doctest
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batchnorm
from batchnorm.stats._conventions import NAMES

C = 3
MEAN, VAR = np.array([1.0, -2.0, 0.5], "f"), np.array([0.5, 4.0, 0.0], "f")
GAMMA, BETA = np.array([2.0, -1.0, 0.0], "f"), np.array([0.25, 3.0, -7.0], "f")
KERAS = {"gamma": GAMMA, "beta": BETA, "moving_mean": MEAN, "moving_variance": VAR}
FLAX = {"scale": GAMMA, "bias": BETA, "mean": MEAN, "var": VAR}
LINEN = {"params": {"scale": GAMMA, "bias": BETA}, "batch_stats": {"mean": MEAN, "var": VAR}}
EMA = {"weight": GAMMA, "bias": BETA, "ema_state_index": (MEAN, VAR), "ema_first_time_index": False}
COUNTED = {"weight": GAMMA, "bias": BETA, "batch_state_index": (MEAN, VAR), "batch_counter": 0}
# The layer's own parameters and, in state, what an average keeps.
HAIKU = {
    "params": {"bn": {"scale": GAMMA.reshape(1, 1, 1, C), "offset": BETA.reshape(1, 1, 1, C)}},
    "state": {
        f"bn/~/{kind}_ema": {"counter": np.int32(2), "hidden": 0.19 * a, "average": a.reshape(1, 1, 1, C)}
        for kind, a in (("mean", MEAN), ("var", VAR))
    },
}
# name, variables, options
LAYERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("keras", KERAS, {}),
    ("tensorflow", {f"bn/{name}:0": value for name, value in KERAS.items()}, {}),
    ("tf-slim", {f"net/BatchNorm/{name}": value for name, value in KERAS.items()}, {}),
    ("flax", LINEN, {}),
    ("flax", FLAX, {}),
    ("nnx", FLAX, {}),
    ("haiku", HAIKU, {"decay_rate": 0.9}),
    ("equinox", EMA, {"mode": "ema"}),
    ("equinox", COUNTED, {}),
]


@pytest.mark.parametrize(("name", "variables", "options"), LAYERS)
def test_a_layer_computes_what_it_computed(
    name: str, variables: dict[str, Any], options: dict[str, Any]
) -> None:
    named = batchnorm.from_framework(name, variables, **options)
    found = batchnorm.from_framework(name, variables, names={named.layers[0]: ""}, **options)
    layer = batchnorm.BatchNorm1d(C, **found.options)
    assert str(layer.load_state_dict(found.values)) == "<All keys matched successfully>"
    x = np.random.default_rng(0).normal(size=(7, C))
    expected = GAMMA * (x - MEAN) / np.sqrt(VAR + layer.eps) + BETA
    actual = layer.double().eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert all(tensor.dtype == torch.float32 for key, tensor in found.values.items() if "num" not in key)


@pytest.mark.parametrize(
    ("name", "options", "momentum", "eps"),
    [
        ("keras", {}, 0.01, 1e-3),
        ("tensorflow", {}, 0.01, 1e-3),
        ("tf-slim", {}, 0.001, 1e-3),
        ("flax", {}, 0.01, 1e-5),
        ("nnx", {}, 0.01, 1e-5),
        ("haiku", {"decay_rate": 0.997}, 0.003, 1e-5),
        ("equinox", {"mode": "ema"}, 0.01, 1e-5),
        ("keras", {"momentum": 0.9, "epsilon": 1e-5}, 0.1, 1e-5),
        ("tf-slim", {"decay": 0.1, "epsilon": 2}, 0.9, 2.0),
        ("keras", {"momentum": 1.0}, 0.0, 1e-3),
        ("keras", {"momentum": 0}, 1.0, 1e-3),
        ("keras", {"momentum": np.float32(0.5)}, 0.5, 1e-3),
    ],
)
def test_momentum_is_the_other_one(name: str, options: dict[str, Any], momentum: float, eps: float) -> None:
    variables = next(v for n, v, o in LAYERS if n == name and o.get("mode") == options.get("mode"))
    assert batchnorm.from_framework(name, variables, **options).options == {"momentum": momentum, "eps": eps}


# x[i] = i²/50, i from 0 to 23, as 2 × 2 × 3 positions of 2 channels: the moving variance of TensorFlow 2.21.0's
# tf_keras.layers.BatchNormalization(momentum=0.75) on a CPU after one batch, which began with 1.
TENSORFLOW = {True: [3.460933208465576, 3.939333200454712], False: [3.23502254486084, 3.673555374145508]}


@pytest.mark.parametrize("fused", TENSORFLOW)
def test_a_batch_in_tensorflow_and_the_same_batch_here(fused: bool) -> None:
    x = torch.arange(24.0).square().div(50).reshape(12, 2)
    ours = batchnorm.BatchNorm1d(2, momentum=0.25)
    ours(x)
    theirs = {"moving_mean": [0.8433333, 0.9583333], "moving_variance": TENSORFLOW[fused]}
    found = batchnorm.from_framework("tensorflow", theirs, fused=fused, count=12)
    # The start, 1, is multiplied by 12/11 as well where the average was biased.
    start = 0.75 * (0 if fused else 1 / 11)
    torch.testing.assert_close(found.values["running_var"].float(), ours.running_var + start)
    torch.testing.assert_close(found.values["running_mean"].float(), ours.running_mean)
    assert (
        any("biased" in note for note in batchnorm.from_framework("tensorflow", theirs, fused=fused).notes)
        != fused
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tensorflow", "tf-slim")])
def test_count_converts_the_biased_variance_and_back(name: str) -> None:
    _, variables, options = next(layer for layer in LAYERS if layer[0] == name)
    plain = batchnorm.from_framework(name, variables, **options)
    counted = batchnorm.from_framework(name, variables, count=5, **options)
    by_name = batchnorm.from_framework(name, variables, count={plain.layers[0]: 5}, **options)
    key = next(key for key in plain.values if key.endswith("running_var"))
    np.testing.assert_allclose(counted.values[key], VAR * 1.25, rtol=1e-7)
    assert torch.equal(by_name.values[key], counted.values[key])
    assert "give count=n" in plain.notes[0]
    assert not any("count=n" in note for note in counted.notes)
    for other in set(plain.values) - {key}:
        assert torch.equal(plain.values[other], counted.values[other])


arrays = st.lists(st.floats(0, 2.0**100, width=32), min_size=4, max_size=4).map(lambda x: np.array(x, "f"))


@given(arrays, arrays, arrays, arrays, st.integers(1, 999), st.booleans(), st.booleans())
def test_there_and_back_nothing_changes(
    gamma: Any, beta: Any, mean: Any, var: Any, thousandths: int, scale: bool, center: bool
) -> None:
    momentum = thousandths / 1000
    state = {"running_mean": torch.tensor(mean), "running_var": torch.tensor(var)}
    state |= {"weight": torch.tensor(gamma)} if scale else {}
    state |= {"bias": torch.tensor(beta)} if center and scale else {}
    for name, options in [(name, {}) for name in NAMES] + [("equinox", {"mode": "ema"})]:
        there = batchnorm.to_framework(
            name, state, momentum=momentum, eps=2e-4, names={"": "bn"}, shape=(1, 1, -1), **options
        )
        back = batchnorm.from_framework(name, there.values, names={"bn": ""}, **there.options)
        assert (back.options["momentum"], back.options["eps"]) == (momentum, 2e-4)
        for key, value in state.items():
            assert torch.equal(back.values[key], value), (name, key)
        extra = set(back.values) - set(state) - {"num_batches_tracked"}
        # Equinox has both or neither.
        assert extra == ({"bias"} if name == "equinox" and scale and not center else set())
        again = batchnorm.to_framework(
            name, back.values, names={"": "bn"}, shape=(1, 1, -1), **back.options, **options
        )
        assert again.options == there.options


@given(arrays, st.integers(2, 10**9))
def test_a_count_loses_no_more_than_a_rounding(var: Any, count: int) -> None:
    state = {"running_mean": torch.zeros(4), "running_var": torch.tensor(var)}
    there = batchnorm.to_framework("keras", state, count=count)
    back = batchnorm.from_framework("keras", there.values, count=count)
    np.testing.assert_array_max_ulp(back.values["running_var"].numpy(), var, maxulp=1)


def test_float64_stays_and_half_types_become_float32() -> None:
    wide = {"moving_mean": np.array([1 / 3]), "moving_variance": torch.tensor([1 / 7], dtype=torch.bfloat16)}
    found = batchnorm.from_framework("keras", wide)
    assert found.values["running_mean"].item() == 1 / 3
    assert found.values["running_var"].dtype == torch.float32
    there = batchnorm.to_framework("keras", found.values)
    assert there.values["moving_mean"].dtype == np.float64


def test_nothing_is_shared_with_what_came() -> None:
    mean = np.ones(2, "f")
    found = batchnorm.from_framework("keras", {"moving_mean": mean, "moving_variance": mean})
    there = batchnorm.to_framework("haiku", found.values, names={"": "bn"}, shape=(-1,))
    state = there.values["state"]["bn/~/mean_ema"]
    found.values["running_mean"].fill_(5)
    state["hidden"][:] = 7
    assert (mean == 1).all()
    assert (state["average"] == 1).all()


def test_a_whole_model_by_its_names_and_by_ours() -> None:
    variables = {
        "params": {
            "stem": {"conv": {"kernel": np.ones((3, 3))}, "bn": {"scale": GAMMA}},
            "head": {"bias": BETA},
        },
        "batch_stats": {"stem": {"bn": {"mean": MEAN, "var": VAR}}, "last": {"mean": MEAN, "var": VAR}},
    }
    found = batchnorm.from_framework("flax", variables)
    assert found.layers == ("stem/bn", "last")
    assert sorted(key for key in found.values if "running" not in key) == [
        "last.num_batches_tracked",
        "last.weight",
        "stem.bn.num_batches_tracked",
        "stem.bn.weight",
    ]
    assert found.options == {"momentum": 0.01, "eps": 1e-5, "bias": False}
    assert found.notes[0] == "left alone: 2 other arrays"
    assert found.notes[-1] == "no γ in last: 1 in its place, which trains unless it is frozen"
    one = batchnorm.from_framework("flax", variables, names={"last": "norm"})
    assert (one.layers, one.options["affine"]) == (("last",), False)
    assert set(one.values) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    net = torch.nn.ModuleDict({"norm": batchnorm.BatchNorm1d(C, **one.options)})
    net.load_state_dict(one.values)

    there = batchnorm.to_framework("flax", {**found.values, "conv.weight": torch.ones(3)}, use_bias=False)
    assert there.notes[0] == "left alone: 1 other entry"
    np.testing.assert_array_equal(there.values["params"]["stem"]["bn"]["scale"], GAMMA)
    np.testing.assert_array_equal(there.values["batch_stats"]["last"]["var"], VAR)


def test_the_trees_that_come_out() -> None:
    state = batchnorm.BatchNorm2d(2).state_dict()

    def names(tree: Any) -> Any:
        return {key: names(value) for key, value in tree.items()} if isinstance(tree, dict) else ()

    def out(name: str, **options: Any) -> Any:
        return names(batchnorm.to_framework(name, state, names={"": "a/bn"}, **options).values)

    assert out("nnx") == {"a": {"bn": {"scale": (), "bias": (), "mean": (), "var": ()}}}
    assert out("flax") == {
        "params": {"a": {"bn": {"scale": (), "bias": ()}}},
        "batch_stats": {"a": {"bn": {"mean": (), "var": ()}}},
    }
    keras = ("gamma", "beta", "moving_mean", "moving_variance")
    assert out("keras") == out("tf-slim") == {f"a/bn/{name}": () for name in keras}
    kept = {"counter": (), "hidden": (), "average": ()}
    assert out("haiku", shape=(1, -1)) == {
        "params": {"a/bn": {"scale": (), "offset": ()}},
        "state": {"a/bn/~/mean_ema": kept, "a/bn/~/var_ema": kept},
    }
    assert out("equinox") == {
        "a/bn": {"weight": (), "bias": (), "batch_state_index": (), "batch_counter": ()}
    }


def test_haikus_averages_move_as_ours_unless_told_otherwise() -> None:
    state = {"running_mean": torch.full((1,), 8.0), "running_var": torch.ones(1)}
    options: dict[str, Any] = {"momentum": 0.25, "names": {"": "bn"}, "shape": (-1,)}
    plain = batchnorm.to_framework("haiku", state, **options).values["state"]["bn/~/mean_ema"]
    assert np.float32(1) - np.float32(0.75 ** int(plain["counter"])) == 1
    assert plain["hidden"] == plain["average"] == 8
    told = batchnorm.to_framework("haiku", state, counter=2, **options).values["state"]["bn/~/mean_ema"]
    assert (told["counter"], told["hidden"].item()) == (2, 8 * (1 - 0.75**2))
    found = batchnorm.from_framework("haiku", HAIKU, decay_rate=0.9)
    assert "counts the next one with 0.369 (" in found.notes[-1]
    assert found.values["bn.num_batches_tracked"] == 2


def test_equinoxs_averages_are_corrected_as_it_does() -> None:
    variables = {"batch_state_index": (MEAN * 0.5, VAR * 0.5), "batch_counter": np.array(1)}
    found = batchnorm.from_framework("equinox", variables, momentum=0.5)
    torch.testing.assert_close(found.values["running_var"], torch.from_numpy(VAR))
    fresh = batchnorm.from_framework("equinox", {**variables, "batch_counter": 0}, momentum=0.5)
    torch.testing.assert_close(fresh.values["running_var"], torch.from_numpy(VAR * 0.5))


def test_the_variables_of_batch_renormalization_are_left_out() -> None:
    renorm = {"moving_stddev": MEAN, "renorm_mean": MEAN, "renorm_stddev": MEAN}
    found = batchnorm.from_framework("keras", {**KERAS, **renorm}, count=9)
    assert found.notes == (
        "left out: moving_stddev, renorm_mean, renorm_stddev, with which their layer trains; evaluation is the same",
    )
    assert set(found.values) == set(batchnorm.BatchNorm1d(C).state_dict())


def test_the_names_in_a_checkpoint_of_tensorflow() -> None:
    end = "/.ATTRIBUTES/VARIABLE_VALUE"
    variables = {f"layer_with_weights-1/{name}{end}": value for name, value in KERAS.items()}
    variables[f"layer_with_weights-1/gamma/.OPTIMIZER_SLOT/optimizer/m{end}"] = GAMMA
    found = batchnorm.from_framework("tensorflow", variables)
    assert (found.layers, found.notes) == (("layer_with_weights-1",), ("left alone: 1 other array",))


def test_slots_of_an_optimizer_are_no_layer() -> None:
    slots = {f"bn/{name}/Momentum": value for name, value in KERAS.items()}
    found = batchnorm.from_framework("tf-slim", {**{f"bn/{k}": v for k, v in KERAS.items()}, **slots})
    assert (found.layers, found.notes[0]) == (("bn",), "left alone: 4 other arrays")


@pytest.mark.parametrize(
    ("name", "variables", "options", "text"),
    [
        ("pytorch", KERAS, {}, "framework: got 'pytorch', expected one of 'keras', 'tensorflow'"),
        ("keras", [MEAN], {}, "nested or not. For example {variable.name: variable for"),
        ("flax", [MEAN], {}, "variables: got a list, expected a dictionary"),
        ("keras", {}, {}, "got no batch norm among nothing, expected moving_mean and moving_variance"),
        ("keras", FLAX, {}, "got no batch norm among bias, mean, scale, var"),
        (
            "flax",
            {"params": {"bn": {"scale": GAMMA}}},
            {},
            'Give both of its trees: {"params": ..., "batch_stats"',
        ),
        ("equinox", {"weight": GAMMA}, {}, "state.get(layer.batch_state_index)"),
        ("equinox", EMA, {}, "expected batch_state_index/0"),
        (
            "equinox",
            {**EMA, "ema_first_time_index": True},
            {"mode": "ema"},
            "expected statistics of at least one",
        ),
        ("equinox", {"batch_state_index": (MEAN, VAR)}, {}, "got no batch_counter"),
        ("equinox", EMA, {"mode": "legacy"}, "mode: got 'legacy', expected 'batch' or 'ema'"),
        (
            "equinox",
            {**COUNTED, "batch_counter": 3},
            {"momentum": 1},
            "momentum: got 1, by which equinox divides",
        ),
        ("keras", {"moving_mean": MEAN}, {}, "variables of the layer: got no moving_variance"),
        ("keras", {"a/moving_mean": MEAN}, {}, "variables of a: got no moving_variance"),
        ("keras", {**KERAS, "gama": GAMMA}, {}, "got gama, expected no more than gamma, beta, moving_mean"),
        (
            "keras",
            {**KERAS, "gamma": GAMMA[:2]},
            {},
            "gamma of the layer: got 2 channels, expected 3, as in moving_",
        ),
        ("keras", {**KERAS, "moving_variance": MEAN}, {}, "got -2 in channel 1, expected variances ≥ 0"),
        ("keras", {**KERAS, "gamma": np.ones((3, 2))}, {}, "gamma of the layer: got shape (3, 2)"),
        (
            "keras",
            {**KERAS, "gamma": "ones"},
            {},
            "gamma of the layer: got a str, expected an array of numbers",
        ),
        (
            "keras",
            KERAS,
            {"eps": 1e-3},
            "option of keras: got eps, expected momentum, epsilon, scale, center",
        ),
        ("keras", KERAS, {"momentum": 9}, "momentum: got 9, expected a number from 0 to 1"),
        ("keras", KERAS, {"momentum": "0.9"}, "momentum: got a str, expected a number"),
        ("keras", KERAS, {"scale": False}, "got scale=False and gamma among the variables"),
        ("haiku", HAIKU, {}, "decay_rate of haiku: got None"),
        ("keras", KERAS, {"count": 1}, "count: got 1.0, expected more than 1"),
        ("keras", KERAS, {"count": {"bn": 9}}, "count: got 'bn', expected the names of the layers"),
        ("keras", KERAS, {"names": {"bn": "bn1"}}, "names: got 'bn', expected names of batch norms: ''"),
        ("keras", KERAS, {"names": {}}, "names: got none"),
    ],
)
def test_errors_of_an_import(name: str, variables: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(batchnorm.BatchNormError, match=re.escape(text)) as caught:
        batchnorm.from_framework(name, variables, **options)
    assert isinstance(caught.value, (TypeError, ValueError))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("keras", {"momentum": None}, "momentum: got None, the plain average over all batches"),
        ("keras", {"mode": "ema"}, "option for keras: got mode, expected affine, bias, scale, center"),
        ("keras", {"affine": False}, "got affine=False and a state dict that says True"),
        ("keras", {"scale": False}, "got a γ that is not 1, expected options that keep it"),
        ("haiku", {}, "shape: got None, expected the shape of Haiku's parameters"),
        ("haiku", {"shape": (-1,)}, 'Give it one: names={"": "batch_norm"}'),
        ("haiku", {"momentum": 0, "shape": (-1,)}, "momentum: got 0, expected more than 1e-8 for haiku"),
        ("haiku", {"counter": 0.5, "shape": (-1,)}, "counter: got a float, expected a whole number"),
        ("flax", {"count": 0.5}, "count: got 0.5, expected more than 1"),
        ("flax", {"names": {"bn": "x"}}, "names: got 'bn', expected names of batch norms: ''"),
    ],
)
def test_errors_of_an_export(name: str, options: dict[str, Any], text: str) -> None:
    layer = batchnorm.BatchNorm1d(C)
    torch.nn.init.constant_(layer.weight, 2)
    with pytest.raises(
        batchnorm.InputError if "float" not in text else batchnorm.InputTypeError, match=re.escape(text)
    ):
        batchnorm.to_framework(name, layer.state_dict(), **options)


def test_a_state_dict_without_batch_norm() -> None:
    with pytest.raises(batchnorm.InputError, match="got no running_mean and running_var"):
        batchnorm.to_framework("keras", torch.nn.Linear(2, 2).state_dict())
    with pytest.raises(batchnorm.InputTypeError, match="got a BatchNorm1d, expected a state dict"):
        batchnorm.to_framework("keras", batchnorm.BatchNorm1d(2))  # type: ignore[arg-type]


def test_the_sessions_of_the_page() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/frameworks.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert (result.failed, result.attempted >= 10) == (0, True)
