"""The batch norm layers of Keras, Flax, Haiku and Equinox behind the same few methods, for `framework_worker.py`."""

from typing import Any

import numpy as np

CHANNELS = 5
Array = np.ndarray[Any, Any]
rng = np.random.default_rng(3)


def images(samples: int = 6, size: int = 4) -> Array:
    spread = np.linspace(0.3, 4, CHANNELS)
    return (rng.normal(size=(samples, size, size, CHANNELS)) * spread + 2 * spread).astype(np.float32)


class Keras:
    name = "keras"
    momentum = "momentum"
    shape = None
    keep = None

    def __init__(self, **options: Any) -> None:
        import keras

        self.layer = keras.layers.BatchNormalization(**options)
        self.layer.build((None, 4, 4, CHANNELS))

    def train(self, x: Array) -> Array:
        return self.layer(x, training=True).detach().numpy()

    def evaluate(self, x: Array) -> Array:
        return self.layer(x, training=False).detach().numpy()

    def variables(self) -> dict[str, Any]:
        return {variable.name: variable for variable in self.layer.variables}

    def take(self, values: dict[str, Any]) -> None:
        assert sorted(values) == sorted(variable.name for variable in self.layer.variables)
        for variable in self.layer.variables:
            variable.assign(values[variable.name])


class Flax:
    name = "flax"
    momentum = "momentum"
    shape = None
    keep = None

    def __init__(self, **options: Any) -> None:
        import jax
        from flax import linen

        self.layer = linen.BatchNorm(**options)
        self.state = self.layer.init(jax.random.key(0), images(), use_running_average=True)

    def train(self, x: Array) -> Array:
        y, moved = self.layer.apply(self.state, x, use_running_average=False, mutable=["batch_stats"])
        self.state = {**self.state, **moved}
        return np.asarray(y)

    def evaluate(self, x: Array) -> Array:
        return np.asarray(self.layer.apply(self.state, x, use_running_average=True))

    def variables(self) -> dict[str, Any]:
        return self.state

    def take(self, values: dict[str, Any]) -> None:
        self.state = values


class Nnx:
    name = "nnx"
    momentum = "momentum"
    shape = None
    keep = None

    def __init__(self, **options: Any) -> None:
        from flax import nnx

        self.nnx, self.layer = nnx, nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0), **options)

    def train(self, x: Array) -> Array:
        return np.asarray(self.layer(x, use_running_average=False))

    def evaluate(self, x: Array) -> Array:
        return np.asarray(self.layer(x, use_running_average=True))

    def variables(self) -> Any:
        return self.nnx.state(self.layer)

    def take(self, values: dict[str, Any]) -> None:
        state = self.nnx.state(self.layer)
        self.nnx.replace_by_pure_dict(state, values)
        self.nnx.update(self.layer, state)


class Haiku:
    name = "haiku"
    momentum = "decay_rate"
    shape = (1, 1, 1, -1)
    keep = "batch_norm"

    def __init__(self, **options: Any) -> None:
        import haiku
        import jax

        options = {"create_scale": True, "create_offset": True, **options}
        self.net = haiku.transform_with_state(lambda x, train: haiku.BatchNorm(**options)(x, train))
        self.params, self.state = self.net.init(jax.random.key(0), images(), True)

    def train(self, x: Array) -> Array:
        y, self.state = self.net.apply(self.params, self.state, None, x, True)
        return np.asarray(y)

    def evaluate(self, x: Array) -> Array:
        return np.asarray(self.net.apply(self.params, self.state, None, x, False)[0])

    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "state": self.state}

    def take(self, values: dict[str, Any]) -> None:
        self.params, self.state = values["params"], values["state"]


class Equinox:
    name = "equinox"
    momentum = "momentum"
    shape = None
    keep = None

    def __init__(self, mode: str = "batch", **options: Any) -> None:
        import equinox

        self.eqx, self.layer = equinox, equinox.nn.BatchNorm(CHANNELS, "batch", mode=mode, **options)
        self.state = equinox.nn.State(self.layer)
        held = ("batch_state_index", "batch_counter", "ema_state_index", "ema_first_time_index")
        self.held = [name for name in held if getattr(self.layer, name) is not None]

    def _run(self, x: Array, inference: bool) -> Array:
        import jax

        def one(sample: Any, state: Any) -> Any:
            return self.layer(sample, state, inference=inference)

        first = np.moveaxis(x, -1, 1)
        y, self.state = jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            first, self.state
        )
        return np.moveaxis(np.asarray(y), 1, -1)

    def train(self, x: Array) -> Array:
        return self._run(x, inference=False)

    def evaluate(self, x: Array) -> Array:
        return self._run(x, inference=True)

    def variables(self) -> dict[str, Any]:
        held = {name: self.state.get(getattr(self.layer, name)) for name in self.held}
        return {"weight": self.layer.weight, "bias": self.layer.bias, **held}

    def take(self, values: dict[str, Any]) -> None:
        import jax.numpy as jnp

        for name in ("weight", "bias"):
            if getattr(self.layer, name) is not None:
                self.layer = self.eqx.tree_at(
                    lambda layer, name=name: getattr(layer, name), self.layer, jnp.asarray(values[name])
                )
        for name in self.held:
            value = values[name]
            new = tuple(map(jnp.asarray, value)) if isinstance(value, tuple) else jnp.asarray(value)
            self.state = self.state.set(getattr(self.layer, name), new)
