"""One framework's own batch norm against ours, in a process of its own: `python framework_worker.py keras`.

JAX warns at every fork of a process it lives in, Keras chooses its backend when it is imported: neither belongs into
the process of the other tests. Each framework is a class with the same few methods; `check` trains its layer, carries
it over, trains both on, and carries it back. Images are channels last there and channels first here.
"""

import sys
from typing import Any

import numpy as np
import torch
from framework_layers import CHANNELS, Array, Equinox, Flax, Haiku, Keras, Nnx, images, rng

import batchnorm


def affine() -> tuple[Array, Array]:
    return rng.normal(1, 0.5, CHANNELS).astype(np.float32), rng.normal(0, 2, CHANNELS).astype(np.float32)


def first(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def last(y: torch.Tensor) -> Array:
    return np.moveaxis(y.detach().numpy(), 1, -1)


def close(actual: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * float(np.abs(expected).max()), err_msg=what
    )


def leaves(tree: Any, path: str = "") -> dict[str, Array]:
    if hasattr(tree, "items"):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{path}/{key}").items()}
    if isinstance(tree, tuple):
        return leaves(dict(enumerate(tree)), path)
    return {} if tree is None else {path: np.asarray(tree)}


def ours_of(found: batchnorm.Translation) -> batchnorm.BatchNorm2d:
    layer = batchnorm.BatchNorm2d(CHANNELS, **found.options)
    layer.load_state_dict(found.values)
    return layer


def names_of(kind: Any, back: bool = False) -> dict[str, str] | None:
    if kind.keep is None:
        return None
    return {"": kind.keep} if back else {kind.keep: ""}


def trained(kind: type, steps: int, **options: Any) -> Any:
    """Their layer after some batches, with γ and β of every sign."""
    theirs = kind(**options)
    theirs.train(images())
    found = batchnorm.from_framework(kind.name, theirs.variables(), names=names_of(kind), **options)
    for part, value in zip(("weight", "bias"), affine(), strict=True):
        if part in found.values and not any(
            f"no {'γ' if part == 'weight' else 'β'}" in n for n in found.notes
        ):
            found.values[part].copy_(torch.from_numpy(value))
    put(theirs, found, options, counter=1)
    for _ in range(steps - 1):
        theirs.train(images())
    return theirs


def put(
    theirs: Any, found: batchnorm.Translation, options: dict[str, Any], counter: int
) -> batchnorm.Translation:
    """What was read from a layer, into it again."""
    more: dict[str, Any] = {name: value for name, value in options.items() if isinstance(value, bool | str)}
    there = batchnorm.to_framework(
        theirs.name,
        found.values,
        names=names_of(theirs, back=True),
        shape=theirs.shape,
        counter=counter,
        **found.options,
        **more,
    )
    theirs.take(there.values)
    return there


def check_import(kind: type, steps: int, training: bool = True, **options: Any) -> None:
    """What it computes in evaluation, and where a further batch takes it."""
    name, options = kind.momentum, {kind.momentum: 0.9, **options}
    theirs = trained(kind, steps, **options)
    found = batchnorm.from_framework(kind.name, theirs.variables(), names=names_of(kind), **options)
    ours, x = ours_of(found).eval(), images()
    close(last(ours(first(x))), theirs.evaluate(x), f"{options}: evaluation")
    assert (ours.momentum, ours.eps) == (
        round(1 - options[name], 10),
        options.get("epsilon", options.get("eps", 1e-3 if kind is Keras else 1e-5)),
    )

    n = x.size // CHANNELS
    unbiased = batchnorm.from_framework(
        kind.name, theirs.variables(), names=names_of(kind), count=n, **options
    )
    ours.load_state_dict(unbiased.values)
    if options[name] ** (steps + 1) > 2**-24 and kind.name in ("haiku", "equinox") and training:
        weight = (1 - options[name]) / (1 - options[name] ** (steps + 1))
        assert any(f"with {weight:.4g} (" in note for note in found.notes), found.notes
        ours.momentum = weight
    output, their_output = last(ours.train()(first(x))), theirs.train(x)
    if training:
        close(output, their_output, f"{options}: a training step")
    moved = batchnorm.from_framework(kind.name, theirs.variables(), names=names_of(kind), count=n, **options)
    for part in ("running_mean", "running_var"):
        close(getattr(ours, part), moved.values[part], f"{options}: {part} after a further batch")
        far = float((moved.values[part] - unbiased.values[part]).abs().max())
        assert far > 1e-3, f"{part} has not moved"


def check_back(kind: type, steps: int, **options: Any) -> None:
    """There and back, nothing changes."""
    name, options = kind.momentum, {kind.momentum: 0.9, **options}
    theirs = trained(kind, steps, **options)
    before = leaves(theirs.variables())
    found = batchnorm.from_framework(kind.name, theirs.variables(), names=names_of(kind), **options)
    there = put(theirs, found, options, counter=int(found.values["num_batches_tracked"]))
    given, after = leaves(there.values), leaves(theirs.variables())
    assert before.keys() == after.keys()
    assert {key.strip("/") for key in given} == {key.strip("/") for key in after}, (
        given.keys(),
        after.keys(),
    )
    for key, value in before.items():
        if "hidden" in key or "batch_state_index" in key:  # ours by 1 − mᵗ in float64, JAX's in float32
            np.testing.assert_array_max_ulp(after[key], value, maxulp=8)
        else:
            np.testing.assert_array_equal(after[key], value, err_msg=key)
    assert there.options[name] == options[name]
    type(theirs)(**there.options)


def check_export(kind: type, **options: Any) -> None:
    """A layer trained here, used and trained on there."""
    ours = batchnorm.BatchNorm2d(CHANNELS, momentum=0.2, eps=3e-4)
    for parameter, value in zip(ours.parameters(), affine(), strict=True):
        parameter.data.copy_(torch.from_numpy(value))
    for _ in range(4):
        ours(first(images()))
    x = images()
    n = x.size // CHANNELS
    for count in (None, n):
        there = batchnorm.to_framework(
            kind.name,
            ours.state_dict(),
            momentum=ours.momentum,
            eps=ours.eps,
            names=names_of(kind, back=True),
            shape=kind.shape,
            count=count,
            **options,
        )
        theirs = kind(**there.options)
        theirs.take(there.values)
        if count is None:
            close(theirs.evaluate(x), last(ours.eval()(first(x))), "evaluation of an exported layer")
    theirs.train(x)
    ours.train()(first(x))
    name, momentum = kind.momentum, there.options[kind.momentum]
    again = batchnorm.from_framework(
        kind.name, theirs.variables(), names=names_of(kind), count=n, **{name: momentum}, **options
    )
    for part in ("running_mean", "running_var"):
        close(again.values[part], getattr(ours, part), f"{part} after a batch of an exported layer")


def check(kind: type, without: tuple[dict[str, bool], ...], debiased: bool = False, **options: Any) -> None:
    name = kind.momentum
    training = options.get("mode") != "ema"
    for momentum, steps in ((0.9, 3), (0.5, 60)):
        check_import(kind, steps, training, **{name: momentum}, **options)
        check_back(kind, steps, **{name: momentum}, **options)
    check_import(kind, 2, training, **{"epsilon" if kind in (Keras, Flax, Nnx) else "eps": 0.02}, **options)
    for missing in without:
        check_import(kind, 3, training, **missing, **options)
    check_export(kind, **options)


def keras() -> None:
    import keras as package

    check(Keras, ({"scale": False}, {"center": False}, {"scale": False, "center": False}))
    theirs = Keras(renorm=True)
    for _ in range(3):
        theirs.train(images())
    found = batchnorm.from_framework("keras", theirs.variables())
    assert any("renorm_mean" in note for note in found.notes), found.notes
    x = images()
    close(last(ours_of(found).eval()(first(x))), theirs.evaluate(x), "renorm: evaluation")

    model = package.Sequential(
        [
            package.layers.Input((8, 8, CHANNELS)),
            package.layers.Conv2D(CHANNELS, 3, name="conv"),
            package.layers.BatchNormalization(name="first"),
            package.layers.ReLU(),
            package.layers.BatchNormalization(name="second", scale=False),
        ]
    )
    for _ in range(3):
        model(images(size=8), training=True)
    paths = {variable.path: variable for variable in model.variables}
    names = {f"{model.name}/first": "1", f"{model.name}/second": "3"}
    found = batchnorm.from_framework("keras", paths, names=names)
    assert found.layers == tuple(names)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(CHANNELS, CHANNELS, 3),
        batchnorm.BatchNorm2d(CHANNELS, **found.options),
        torch.nn.ReLU(),
        batchnorm.BatchNorm2d(CHANNELS, **found.options),
    )
    kernel, bias = (np.asarray(variable) for variable in model.layers[0].variables)
    net[0].load_state_dict({"weight": torch.tensor(kernel.transpose(3, 2, 0, 1)), "bias": torch.tensor(bias)})
    assert not net.load_state_dict(found.values, strict=False).unexpected_keys
    x = images(size=8)
    close(last(net.eval()(first(x))), model(x, training=False).detach().numpy(), "a whole model")


def flax() -> None:
    missing = ({"use_scale": False}, {"use_bias": False}, {"use_scale": False, "use_bias": False})
    check(Flax, missing)
    check(Nnx, missing)

    import jax
    from flax import linen, nnx

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool) -> Any:
            for _ in range(2):
                x = linen.Conv(CHANNELS, (3, 3), padding="VALID")(x)
                x = linen.BatchNorm(use_running_average=not train)(x)
            return x

    net = Net()
    state = net.init(jax.random.key(0), images(), True)
    found = batchnorm.from_framework("flax", state)
    assert found.layers == ("BatchNorm_0", "BatchNorm_1")
    assert found.notes[0] == "left alone: 4 other arrays"
    assert jax.tree.map(np.shape, batchnorm.to_framework("flax", found.values).values) == jax.tree.map(
        np.shape,
        {
            "params": {name: state["params"][name] for name in found.layers},
            "batch_stats": state["batch_stats"],
        },
    )

    class Blocks(nnx.Module):
        def __init__(self) -> None:
            self.blocks = nnx.List([nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0)) for _ in range(2)])

    assert batchnorm.from_framework("nnx", nnx.state(Blocks())).layers == ("blocks/0", "blocks/1")


def haiku() -> None:
    check(
        Haiku,
        ({"create_scale": False}, {"create_offset": False}, {"create_scale": False, "create_offset": False}),
    )

    import haiku as hk
    import jax

    def net(x: Any) -> Any:
        small = hk.nets.ResNet((1, 1, 1, 1), 10, channels_per_group=(8, 8, 8, 8), bottleneck=False)
        return small(x, is_training=True)

    params, state = hk.transform_with_state(net).init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    found = batchnorm.from_framework("haiku", {"params": params, "state": state}, decay_rate=0.9)
    assert (
        len(found.layers) == 13
    )  # one before the blocks, two in each of four, and one in each of their shortcuts
    assert "res_net/~/initial_batchnorm" in found.layers
    assert "res_net.initial_batchnorm.running_var" in found.values
    back = {layer.replace("/~/", ".").replace("/", "."): layer for layer in found.layers}
    there = batchnorm.to_framework("haiku", found.values, names=back, shape=(1, 1, 1, -1), counter=0)
    for tree, mine in ((params, there.values["params"]), (state, there.values["state"])):
        shapes = jax.tree.map(np.shape, tree)
        assert {key: shapes[key] for key in mine} == jax.tree.map(np.shape, mine)


def equinox() -> None:
    for mode in ("batch", "ema"):
        check(Equinox, ({"channelwise_affine": False},), mode=mode)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"keras": keras, "flax": flax, "haiku": haiku, "equinox": equinox}[sys.argv[1]]()
