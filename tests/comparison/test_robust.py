"""Models, data and optimizers that misbehave, and interruptions at awkward moments."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import BatchNormError, DataError, InputError, InputTypeError, ModelError
from batchnorm.comparison import Comparison, Silent, _compare
from batchnorm.comparison.data import Loaders
from batchnorm.comparison.record import record_test

X = torch.linspace(-1, 1, 80).view(20, 4).sin()
Y = torch.arange(20) % 3
GOOD = (X, Y, X, Y)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def compare(data: Any = GOOD, make: Callable[[], nn.Module] = plain, **options: Any) -> Comparison:
    settings = {"lrs": [0.1], "seeds": 1, "steps": 3, "batch_size": 5, **options}
    return batchnorm.compare(make, data, **settings)


def refused(error: type[BatchNormError], words: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error) as caught:
        compare(*arguments, **options)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text


class Scaling(nn.Module):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3)


class Tripling(nn.Module):
    """The same without touching its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 3


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(X[:10].clone(), Y[:10]), (X[10:].clone(), Y[10:])]


@pytest.mark.parametrize("loaders", [False, True])
def test_a_model_that_changes_its_input_sees_and_leaves_the_data_as_they_were(loaders: bool) -> None:
    data = (batches(), batches()) if loaders else tuple(part.clone() for part in GOOD)
    size = None if loaders else 5
    found = compare(data, lambda: nn.Sequential(Scaling(), *plain()), lrs=[0.1, 0.3], batch_size=size)
    expected = compare(
        (batches(), batches()) if loaders else GOOD,
        lambda: nn.Sequential(Tripling(), *plain()),
        lrs=[0.1, 0.3],
        batch_size=size,
    )
    assert found.runs == expected.runs
    assert found.footing == expected.footing
    if loaders:
        for part in data:
            for given, untouched in zip(part, batches(), strict=True):
                assert torch.equal(given[0], untouched[0])
    else:
        assert all(torch.equal(a, b) for a, b in zip(data, GOOD, strict=True))


def test_a_test_loader_may_refill_its_buffer() -> None:
    class Buffered:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            buffer = torch.empty(10, 4)
            for x, y in batches():
                yield buffer.copy_(x), y

    recorded = record_test(Loaders(batches(), Buffered()), torch.device("cpu"))
    for (x, _), (expected, _) in zip(recorded, batches(), strict=True):
        assert torch.equal(x, expected)


def test_a_model_in_float64_takes_the_data() -> None:
    found = compare((X.double(), Y, X.double(), Y), lambda: plain().double())
    assert found.footing is not None


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_whatever_the_block_it_is_called_in(block: Callable[[], Any]) -> None:
    with block():
        found = compare(tuple(part.clone() for part in GOOD))
        assert torch.is_grad_enabled() is False
    assert found.runs == compare().runs


class Pair(nn.Module):
    """Gives more than the scores while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Any:
        scores = self.net(x)
        return (scores, scores) if self.training else scores


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("mask")


class Keeping(nn.Module):
    """Keeps what it computed, so that PyTorch cannot copy it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.kept = self.net[0].weight * 2

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class KeepingOutput(Keeping):
    """Keeps it while it is trained: it can be compared, but its batch statistics cannot be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(1)

    def forward(self, x: Tensor) -> Any:
        scores = self.net(x)
        if self.training:
            self.kept = scores
        return scores


def leave() -> nn.Module:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Pair, "the model's output: got a tuple, expected shape (5, classes)"),
        (Failing, "(KeyError: 'mask')"),
        (Keeping, "an error on copying it (RuntimeError: Only Tensors created explicitly"),
        (leave, "make_model(): got SystemExit: 0"),
        (lambda: nn.Sequential(plain(), nn.Threshold(0.5, 1), Rounded()), "shape (2, 3), torch.int64"),
        (lambda: nn.Sequential(plain(), Detached()), "an error in a training step (RuntimeError"),
    ],
)
def test_models(make: Callable[[], nn.Module], words: str) -> None:
    refused(ModelError, words, make=make)


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_a_model_that_cannot_be_observed_is_still_compared() -> None:
    found = compare(make=KeepingOutput)
    assert len(found.runs) == 2
    assert found.footing is None


def test_images_before_a_linear_layer_are_answered_with_flatten() -> None:
    images = X.view(20, 1, 2, 2)
    refused(ModelError, "begin the model with nn.Flatten()", (images, Y, images, Y))


def test_labels_that_count_from_one_are_recognized() -> None:
    refused(ModelError, "subtract 1 from the labels", (X, Y + 1, X, Y + 1))


def fails(parameters: Any, lr: float) -> Any:
    raise ZeroDivisionError("lr")


class NoStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise ValueError("no\nstep")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": torch.optim.LBFGS}, InputTypeError, "LBFGS, whose step() fails (TypeError"),
        ({"optimizer": NoStep}, InputTypeError, "NoStep, whose step() fails (ValueError: no step)"),
        ({"optimizer": fails}, InputError, "optimizer: got ZeroDivisionError: lr"),
        ({"optimizer": lambda: None}, InputError, "expected a function (parameters, lr) -> optimizer"),
        ({"optimizer": [1]}, InputTypeError, "optimizer: got a list, expected one of sgd"),
        ({"device": None}, InputTypeError, "device: got None"),
        ({"device": "gpu"}, InputError, "expected auto, cpu, cuda, cuda:1, mps or xpu. An NVIDIA GPU"),
        ({"lrs": "12"}, InputTypeError, "lrs: got '12', expected several positive numbers"),
    ],
)
def test_options(options: dict[str, Any], error: type[BatchNormError], words: str) -> None:
    refused(error, words, **options)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    found = compare(seeds=np.int64(1), steps=np.int32(2), batch_size=np.uint8(5))
    assert (found.setup.seeds, found.setup.steps, found.setup.batch_size) == (1, 2, 5)
    assert type(found.setup.seeds) is int


HOT = torch.eye(3)[Y]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X, Y, X, Y * 0), "y_test: got only the class 0, expected at least two classes"),
        ((X, X[:7], Y, Y[:7]), "Swap the second and the third"),
        (((X, Y), (X, Y)), "Unpack the pairs: (*train, *test)"),
        ((X, HOT, X, HOT), "y_train: got one-hot rows of shape (20, 3)"),
        ((X, HOT.long(), X, HOT.long()), "Convert with .argmax(1)"),
        ((X, Y.float().numpy(), X, Y), '.astype("int64")'),
        ((X, Y + 0.25, X, Y), "y_train: got numbers such as 0.25"),
        ((X, Y * 10**9, X, Y), "y_train: got the label 2000000000"),
    ],
)
def test_data(data: Any, words: str) -> None:
    refused(DataError, words, data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((X.to_sparse(), Y, X, Y), "x_train: got a sparse tensor"),
        ((X, np.array(["cat", "dog"] * 10), X, Y), "numpy.unique(y, return_inverse=True)"),
    ],
)
def test_data_of_another_type(data: Any, words: str) -> None:
    refused(InputTypeError, words, data)


def test_a_test_loader_with_one_class() -> None:
    refused(
        DataError,
        "targets of the test loader: got only the class 1",
        (batches(), [(X, Y * 0 + 1)]),
        batch_size=None,
    )


class Counting(Silent):
    """Counts the trainings."""

    runs = 0

    def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
        self.runs += 1


def test_a_loader_that_is_used_up_is_found_out_before_any_training() -> None:
    progress = Counting()
    used = (iter(batches()), batches())
    refused(
        DataError, "no batches at the second pass", used, batch_size=None, steps=2, seeds=2, progress=progress
    )
    assert progress.runs == 0
    once = compare((iter(batches()), batches()), batch_size=None, steps=2)
    assert len(once.runs) == 2


def test_a_loader_that_fails_is_one_line() -> None:
    def broken() -> Iterator[Any]:
        yield X[:10], Y[:10]
        raise FileNotFoundError("image 7\nis missing")

    refused(
        DataError,
        "training loader: got FileNotFoundError (image 7 is missing)",
        (broken(), batches()),
        batch_size=None,
    )


def test_ctrl_c_right_after_the_last_training_keeps_it(ctrl_c: Callable[[], None]) -> None:
    class Late(Silent):
        def run_finished(
            self, label: str, normalized: bool, lr: float, seed: int, final_score: float, diverged: bool
        ) -> None:
            if normalized:
                ctrl_c()

    found = compare(progress=Late())
    assert found.interrupted
    assert len(found.runs) == 2


@pytest.mark.parametrize("moment", ["finish", "summary"])
def test_ctrl_c_while_the_result_is_put_together_waits(
    ctrl_c: Callable[[], None], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Late(Silent):
        def finish(self) -> None:
            if moment == "finish":
                ctrl_c()

    original = _compare.summarize

    def summarize(*arguments: Any) -> Any:
        ctrl_c()
        return original(*arguments)

    if moment == "summary":
        monkeypatch.setattr(_compare, "summarize", summarize)
    found = compare(progress=Late())
    assert found.interrupted
    assert found.footing is not None


def test_a_second_ctrl_c_does_not_lose_what_is_finished(ctrl_c: Callable[[], None]) -> None:
    class Impatient(Silent):
        def run_started(self, label: str, normalized: bool, lr: float, seed: int) -> None:
            if lr == 0.3:
                ctrl_c()

        def finish(self) -> None:
            ctrl_c()

    found = compare(lrs=[0.1, 0.3], progress=Impatient())
    assert found.interrupted
    assert [run.lr for run in found.runs] == [0.1, 0.1]


def stopped_after(trainings: int, progress: Silent | None = None) -> InputError:
    """The error of a comparison of two rates and two seeds that fails after so many trainings."""
    made: list[float] = []

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        made.append(lr)
        if len(made) > trainings:
            raise MemoryError("out of\nmemory")
        return torch.optim.SGD(parameters, lr=lr)

    with pytest.raises(InputError, match="optimizer: got MemoryError: out of memory") as caught:
        compare(lrs=[0.1, 0.3], seeds=2, progress=progress, optimizer=optimizer)
    return caught.value


@pytest.mark.parametrize(("trainings", "pairs"), [(2, 1), (3, 1), (4, 2), (7, 3)])
def test_an_error_brings_what_was_finished_before_it(trainings: int, pairs: int) -> None:
    class Ended(Silent):
        ended = 0

        def finish(self) -> None:
            self.ended += 1

    progress, threads, state = Ended(), torch.get_num_threads(), torch.get_rng_state()
    error = stopped_after(trainings, progress)
    assert progress.ended == 1
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    found: Comparison = error.comparison
    assert error.__notes__ == [
        f"{2 * pairs} finished trainings: see the attribute `comparison` of this error."
    ]
    assert found.runs == compare(lrs=[0.1, 0.3], seeds=2, dynamics=False).runs[: 2 * pairs]
    assert found.summary.seeds == (0,)
    assert found.interrupted
    assert found.error == f"InputError: {error}"
    assert found.incomplete == (
        f"Stopped by an error ({found.error}): {pairs} of 4 pairs of trainings are finished; "
        "the figures rest on 1 seed."
    )
    assert found.document().incomplete == found.incomplete
    assert found.incomplete in str(found)
    assert found.to_dict()["error"] == found.error


@pytest.mark.parametrize("trainings", [0, 1])
def test_an_error_before_the_first_pair_brings_nothing(trainings: int) -> None:
    assert not hasattr(stopped_after(trainings), "comparison")


def test_an_error_of_the_progress_display_brings_what_was_finished() -> None:
    class Full(Silent):
        def run_finished(self, label: str, normalized: bool, *rest: Any) -> None:
            if normalized:
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space left") as caught:
        compare(progress=Full())
    assert len(caught.value.comparison.runs) == 2
