"""`watch` and what happens to a model meanwhile: errors, copies, compilers, wrappers, threads."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from watch_helpers import Writer, conv_net, hooks, pictures, quiet, steps_of, train

import batchnorm

ORDINARY = [pictures(seed=seed) for seed in range(6)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_hook_stays_behind_an_error(error: type[BaseException]) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.net(x)
            raise error

    model = Failing()
    with pytest.raises(error), quiet(model, every=1):
        model(ORDINARY[0])
    assert hooks(model) == 0
    # Without a block: the next forward is looked at. PyTorch calls no hook behind one that Ctrl-C has ended.
    watcher = quiet(model, every=1)
    for step in (1, 2):
        with pytest.raises(error):
            model(ORDINARY[0])
        assert hooks(model) == (2 if error is ValueError else 4)
        assert watcher.step == step
    watcher.close()
    assert hooks(model) == 0


def test_copies_and_pickles_take_no_part() -> None:
    model = conv_net()
    keys = list(model.state_dict())
    with quiet(model, every=1) as watcher:
        train(model, ORDINARY[:1])
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.optim.swa_utils.AveragedModel(model).module,
        ]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        assert list(model.state_dict()) == keys
        for each in copies:
            each(ORDINARY[1])
            copy.deepcopy(each)
        assert watcher.step == 1


class Ended(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def test_a_copy_made_after_ctrl_c_takes_no_part() -> None:
    """PyTorch calls no hook behind a forward that Ctrl-C has ended, so those of the layers stay till the next one."""

    model = nn.Sequential(conv_net(), Ended())
    watcher = quiet(model, every=1)
    with pytest.raises(KeyboardInterrupt):
        model(ORDINARY[0])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    looking = watcher._looking
    assert looking is not None
    for each in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        each[0](ORDINARY[1])
        pickle.dumps(each)
    assert len(looking._watch.notes["0.1"].calls["train"]) == 1
    watcher.close()
    assert hooks(model) == 0


def test_another_thread_in_the_model() -> None:
    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if threading.current_thread() is first:
                inside.set()
                assert on.wait(60)
            return x

    model = nn.Sequential(Waits(), nn.BatchNorm1d(4), Waits(), nn.Linear(4, 2))
    inside, on = threading.Event(), threading.Event()
    first = threading.Thread(target=lambda: model(torch.randn(8, 4)).sum().backward())
    with quiet(model, every=1) as watcher:
        first.start()
        assert inside.wait(60)
        model(torch.randn(32, 4)).sum().backward()
        assert watcher.step == 1
        on.set()
        first.join()
        assert hooks(model) == 2
    assert watcher.numbers["1"]["values"] == 8
    assert hooks(model) == 0


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = conv_net()
    with pytest.raises(batchnorm.ModelError, match=r"watch: model: got 0\.weight on the meta device"):
        batchnorm.watch(model)
    assert hooks(model) == 0


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_not_compiled_again(backend: str) -> None:
    torch._dynamo.reset()
    model, writer = conv_net(), Writer()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    train(compiled, ORDINARY[:1])
    with torch.compiler.set_stance("fail_on_recompile"), quiet(compiled, every=1, writer=writer) as watcher:
        train(compiled, ORDINARY)
        notes = watcher.findings.notes
    assert steps_of(writer) == [1, 2, 3, 4, 5, 6]
    assert "batchnorm/1/gamma" in writer.scalars
    assert "batchnorm/1/mean_gap" not in writer.scalars
    assert notes == ("the model is compiled: weights and running statistics are looked at, calls are not",)


def test_a_model_that_is_compiled_in_place_or_later() -> None:
    torch._dynamo.reset()
    # (a Sequential that is compiled in place runs as it is)
    model, writer = Inner(), Writer()
    model.compile(backend="eager", fullgraph=True)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.01)
    with quiet(model, every=1, writer=writer) as watcher:
        train(model, ORDINARY[:3])
        other.step()
        assert watcher.step == 3
    assert steps_of(writer) == [1, 2, 3]
    later = conv_net()
    optimizer = torch.optim.SGD(later.parameters(), 0.01)
    with quiet(later, every=1, optimizer=optimizer) as watcher:
        train(torch.compile(later, backend="eager", fullgraph=True), ORDINARY[:3], optimizer)
    assert watcher.step == 3
    assert watcher.numbers["1"]["gamma"] > 0
    with quiet(later, every=1) as watcher:
        train(torch.compile(later, backend="eager", fullgraph=True), ORDINARY[:2], optimizer)
    assert "no training step was seen" in watcher.findings.notes[-1]


def test_wrapped_models() -> None:
    wrapped = nn.DataParallel(conv_net())
    with quiet(wrapped, every=1) as watcher:
        train(wrapped, ORDINARY[:2])
    assert set(watcher.numbers) == {"1", "4"}
    assert watcher.step == 2
