import copy
import io
import pickle
import random

import pytest
import torch
from surgery_helpers import check_fused as check
from surgery_helpers import names, notes, randomize
from torch import nn
from torch.nn import functional as F

import batchnorm

LAYERS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True)],
    "relu6": [nn.ReLU6(), nn.ReLU6(inplace=True)],
    "leaky_relu": [nn.LeakyReLU(0.2), nn.LeakyReLU(inplace=True)],
    "silu": [nn.SiLU(), nn.SiLU(inplace=True)],
    "hardswish": [nn.Hardswish(), nn.Hardswish(inplace=True)],
    "gelu": [nn.GELU(), nn.GELU("none")],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_sequence(name: str, inplace: bool) -> None:
    for layer in LAYERS[name]:
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), layer, nn.Conv2d(5, 2, 1))
        changes = check(net, torch.randn(4, 3, 6, 5), inplace=inplace)
        assert notes(changes) == {"1": "takes its activation", "2": "the batch norm before it does it"}
        norm = changes.model[1]
        assert (type(norm), norm.activation) == (batchnorm.BatchNorm2d, name)
        assert norm.negative_slope == getattr(layer, "negative_slope", 0.01)
        assert isinstance(changes.model[2], nn.Identity)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (6, 3)),
        (nn.BatchNorm1d, (4, 3, 5)),
        (nn.BatchNorm2d, (4, 3, 5, 2)),
        (nn.BatchNorm3d, (2, 3, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]
)
def test_every_rank_and_option(
    layer: type[nn.Module], shape: tuple[int, ...], options: dict[str, object]
) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.norms = nn.ModuleList([layer(3, **options), layer(3, **options)])

        def forward(self, x):
            y = F.silu(self.norms[0](x * self.scale))
            return F.relu(self.norms[1](y) + x)

    changes = check(Two(), torch.randn(*shape))
    found = notes(changes)
    assert found["norms.0"] == "takes the activation in the forward of the model"
    assert found["norms.1"] == "takes the addition and the activation in the forward of the model"


FUNCTIONS = {
    "relu": [
        F.relu,
        torch.relu,
        F.relu_,
        torch.relu_,
        lambda y: F.relu(y, True),
        lambda y: F.relu(y, inplace=True),
        lambda y: y.relu(),
        lambda y: y.relu_(),
    ],
    "relu6": [F.relu6, lambda y: F.relu6(y, inplace=True)],
    "leaky_relu": [
        F.leaky_relu,
        lambda y: F.leaky_relu(y, 0.3),
        lambda y: F.leaky_relu(y, negative_slope=0.3),
        lambda y: F.leaky_relu_(y, 0.2),
        lambda y: F.leaky_relu(y, 0.2, True),
    ],
    "silu": [F.silu, lambda y: F.silu(y, inplace=True)],
    "hardswish": [F.hardswish, lambda y: F.hardswish(y, True)],
    "gelu": [F.gelu, lambda y: F.gelu(y, approximate="none")],
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_and_methods(name: str) -> None:
    for function in FUNCTIONS[name]:

        class Own(nn.Module):
            def __init__(self, function=function) -> None:
                super().__init__()
                self.conv, self.bn, self.function = nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), function

            def forward(self, x):
                return self.function(self.bn(self.conv(x))).flatten(1)

        changes = check(Own(), torch.randn(4, 3, 6), inplace=True)
        assert notes(changes)["bn"] == "takes the activation in the forward of the model"
        assert type(changes.model).__name__ == "FusedOwn"
        assert changes.model.bn.activation == name


OTHERS = [
    nn.GELU("tanh"),
    nn.ELU(),
    nn.Tanh(),
    nn.Hardtanh(),
    nn.PReLU(4),
    nn.Dropout(0.0),
    nn.MaxPool2d(2),
]


@pytest.mark.parametrize("layer", OTHERS, ids=lambda layer: type(layer).__name__)
def test_what_the_layer_cannot_do_stays(layer: nn.Module) -> None:
    changes = check(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), layer, nn.ReLU()), torch.randn(4, 3, 6, 6)
    )
    assert notes(changes) == {"1": f"{type(layer).__name__} (2) follows it"}
    assert type(changes.model[1]) is batchnorm.BatchNorm2d


def test_functions_the_layer_cannot_do_stay() -> None:
    for function in (
        lambda y: F.gelu(y, approximate="tanh"),
        torch.tanh,
        lambda y: F.leaky_relu(y, y.shape[0] / 10),
        lambda y: F.relu(F.dropout(y, 0.0)),
        lambda y: F.relu(y * 2),
        lambda y: F.relu(y) + y,
        lambda y: F.relu(y + 1),
        lambda y: F.relu(torch.add(y, y * 2, alpha=2)),
        lambda y: F.relu(y + y),
        lambda y: torch.cat([F.relu(y), y]),
    ):

        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, /):
                return function(self.bn(x))  # noqa: B023 - called before the loop goes on

        changes = check(Own(), torch.randn(4, 3, 5, 5))
        assert names(changes) == ["bn"], function
        assert type(changes.model) is Own


class Block(nn.Module):
    """torchvision's residual block: one relu layer for two places, an addition in place."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        self.stride = stride
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6, 2))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_residual_blocks(inplace: bool) -> None:
    changes = check(ResNet(), torch.randn(4, 3, 9, 9), inplace=inplace)
    found = notes(changes)
    assert found == {
        "stem.1": "takes its activation",
        "stem.2": "the batch norm before it does it",
        "blocks.0": "its forward calls the fused layers",
        "blocks.0.bn1": "takes the activation in the forward of blocks.0",
        "blocks.0.bn2": "takes the addition and the activation in the forward of blocks.0",
        "blocks.1": "its forward calls the fused layers",
        "blocks.1.bn1": "takes the activation in the forward of blocks.1",
        "blocks.1.bn2": "takes the addition and the activation in the forward of blocks.1",
        "blocks.1.downsample.1": "its output is added in place to another value",
    }
    block = changes.model.blocks[1]
    assert isinstance(block, Block)
    assert (block.stride, type(block.relu), type(changes.model)) == (2, nn.ReLU, ResNet)
    assert changes.skipped == ()


def test_the_very_objects_stay() -> None:
    net = ResNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    objects = [*net.modules(), *net.parameters(), *net.buffers()]
    changes = batchnorm.fuse(net, inplace=True)
    now = [*net.modules(), *net.parameters(), *net.buffers()]
    same = [a is b for a, b in zip(objects, now, strict=True)]
    # The stem's relu is an identity; its place among the modules is the fifth.
    assert [index for index, each in enumerate(same) if not each] == [4]
    net(torch.randn(2, 3, 9, 9)).sum().backward()
    before = net.blocks[0].bn2.weight.clone()
    optimizer.step()
    assert not torch.equal(before, net.blocks[0].bn2.weight)
    changes.revert()
    assert all(
        a is b for a, b in zip(objects, [*net.modules(), *net.parameters(), *net.buffers()], strict=True)
    )
    assert "activation" not in vars(net.stem[1])


def test_a_fused_block_is_copied_and_pickled() -> None:
    net = batchnorm.fuse(ResNet()).model.eval()
    x = torch.randn(2, 3, 9, 9)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        assert other.blocks[0].bn1 is not net.blocks[0].bn1
        assert type(other.blocks[0]) is type(net.blocks[0])
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))


def test_a_fused_model_is_traced_compiled_and_exported() -> None:
    net, x = batchnorm.fuse(randomize(ResNet())).model.eval(), torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    compiled = torch.compile(net.train(), backend="aot_eager", fullgraph=True)
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(compiled(x), expected)


def test_a_fused_model_can_be_folded_and_its_batch_norms_removed() -> None:
    net, x = randomize(ResNet()).double().eval(), torch.randn(2, 3, 9, 9).double()
    folded = batchnorm.fold(batchnorm.fuse(net).model, x)
    assert (len(folded.changed), folded.skipped) == (6, ()), str(folded)
    torch.testing.assert_close(folded.model(x), net(x))
    assert len(batchnorm.remove(batchnorm.fuse(net).model).changed) == 6
    again = batchnorm.fuse(batchnorm.fuse(net).model)
    assert again.changed == ()
    assert {skip.reason for skip in again.skipped} >= {"it has an activation already"}


def test_hooks_stay_and_go_on_seeing_what_they_saw() -> None:
    net = ResNet()
    seen: list[str] = []
    handle = net.blocks[0].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    net.blocks[0].bn1.register_forward_hook(lambda module, args, out: seen.append(str(bool((out < 0).any()))))
    net.stem[2].register_forward_hook(lambda module, args, out: seen.append("relu"))
    changes = batchnorm.fuse(net, inplace=True)
    found = notes(changes)
    assert found["blocks.0.bn1"] == "it carries a forward hook, which would see the activation's output"
    assert found["stem.1"] == "ReLU (stem.2) follows it"
    assert "blocks.0.bn2" in found
    net(torch.randn(2, 3, 9, 9))
    assert seen == ["relu", "True", "FusedBlock"]
    handle.remove()
    net(torch.randn(2, 3, 9, 9))
    assert len(seen) == 5


def test_one_activation_layer_in_many_places() -> None:
    relu = nn.ReLU()
    all_behind = nn.Sequential(nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), relu)
    changes = check(all_behind, torch.randn(4, 3, 5, 5))
    assert changes.model[1] is changes.model[4]
    assert isinstance(changes.model[1], nn.Identity)
    relu = nn.ReLU()
    some = nn.Sequential(
        nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), relu, nn.BatchNorm2d(3), nn.Identity(), relu
    )
    changes = check(some, torch.randn(4, 3, 5, 5))
    kinds = [type(module).__name__ for module in changes.model]
    assert kinds == ["BatchNorm2d", "Identity", "Conv2d", "ReLU", "BatchNorm2d", "Identity", "Identity"]
    assert notes(changes)["0"] == notes(changes)["4"] == "takes its activation"


def test_shared_batch_norms() -> None:
    class Twice(nn.Module):
        def __init__(self, second) -> None:
            super().__init__()
            self.conv, self.bn, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), second

        def forward(self, x):
            y = F.relu(self.bn(self.conv(x)))
            return self.second(self.bn(self.conv(y)))

    x = torch.randn(4, 3, 5, 5)
    changes = check(Twice(F.relu), x)
    assert notes(changes)["bn"] == "takes the activation in the forward of the model"
    changes = check(Twice(F.silu), x)
    assert notes(changes)["bn"] == "its calls are followed by different activations"
    changes = check(Twice(lambda y: F.relu(y * 2)), x)
    assert notes(changes)["bn"] == "mul follows it"
    shared = nn.BatchNorm2d(3)
    changes = check(nn.Sequential(shared, nn.ReLU(), nn.Conv2d(3, 3, 1), shared, nn.ReLU()), x)
    assert changes.model[0] is changes.model[3]
    assert type(shared) is nn.BatchNorm2d
    changes = check(nn.Sequential(shared, nn.ReLU(), nn.Conv2d(3, 3, 1), shared, nn.SiLU()), x)
    assert names(changes) == ["0"]


def test_random_state_is_left_alone() -> None:
    random.seed(1)
    torch.manual_seed(1)
    batchnorm.fuse(ResNet().eval())
    first = random.random()
    random.seed(1)
    ResNet()
    assert random.random() == first
