"""DomainBatchNorm: which domain a call is of, what it computes, and what a checkpoint gives it."""

import copy
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import same_bits
from torch import nn

import batchnorm

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 4, 4), (3, 3, 2, 3, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class TwoStatistics:
    """The obvious way: the formula in PyTorch's operators with a pair of running statistics for each name."""

    def __init__(self, names, channels: int, eps: float, momentum: float) -> None:
        self.mean = {name: torch.zeros(channels).double() for name in names}
        self.var = {name: torch.ones(channels).double() for name in names}
        self.eps, self.momentum = eps, momentum

    def __call__(self, x, name, weight, bias, training, residual=None, mask=None, activation=None):
        axes = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        valid = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)
        n = valid.sum()
        if training:
            mean = (x * valid).sum(axes) / n
            var = ((x - mean.view(shape)).square() * valid).sum(axes) / n
            with torch.no_grad():
                for old, new in ((self.mean, mean), (self.var, var * n / (n - 1))):
                    old[name] = (1 - self.momentum) * old[name] + self.momentum * new
        else:
            mean, var = self.mean[name], self.var[name]
        y = (x - mean.view(shape)) / (var + self.eps).sqrt().view(shape)
        y = y * weight.view(shape) + bias.view(shape)
        y = y if residual is None else y + residual
        return (getattr(F, activation)(y) if activation else y) * valid


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_a_pair_of_statistics(shape, extras: bool, shared: bool) -> None:
    activation = "silu" if extras else None
    layer = batchnorm.DomainBatchNorm(
        3, ("a", "b"), 1e-3, 0.3, dtype=torch.float64, shared_affine=shared, activation=activation
    )
    for each in (layer.a, layer.b):
        nn.init.normal_(each.weight)
        nn.init.normal_(each.bias)
    expected = TwoStatistics(("a", "b"), 3, 1e-3, 0.3)
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if extras else None
    for training, name in ((True, "a"), (True, "b"), (True, "a"), (False, "b"), (False, "a"), (True, "b")):
        layer.train(training)
        x = (torch.randn(shape).double() * 3 + ord(name)).requires_grad_()
        residual = torch.randn(shape).double().requires_grad_() if extras else None
        dy = torch.randn(shape).double()
        weight, bias = getattr(layer, name).weight, getattr(layer, name).bias
        wanted = [each for each in (x, weight, bias, residual) if each is not None]
        y = layer(x, residual, mask, domain=name)
        truth = expected(x, name, weight, bias, training, residual, mask, activation)
        torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-9)
        for one, other in zip(
            torch.autograd.grad(y, wanted, dy), torch.autograd.grad(truth, wanted, dy), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        for each in ("a", "b"):
            torch.testing.assert_close(getattr(layer, each).running_mean, expected.mean[each])
            torch.testing.assert_close(getattr(layer, each).running_var, expected.var[each])
    assert [layer.a.num_batches_tracked.item(), layer.b.num_batches_tracked.item()] == [2, 2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_very_bits_of_the_plain_layer(dtype: torch.dtype, layout) -> None:
    options = {"activation": "relu", "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
    layer = batchnorm.DomainBatchNorm(3, **options)
    plain = {name: batchnorm.BatchNorm2d(3, **options) for name in layer.domains}
    for name in ("clean", "adversarial", "clean"):
        x = (torch.randn(4, 3, 5, 5) + len(name)).to(dtype).to(memory_format=layout)
        y, truth = layer(x, domain=name), plain[name](x)
        assert same_bits(y, truth)
        assert y.stride() == truth.stride()
    for name in layer.domains:
        for key, value in plain[name].state_dict().items():
            assert same_bits(getattr(layer, name).state_dict()[key], value)
        assert same_bits(layer.eval()(x, domain=name), plain[name].eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool) -> None:
    layer = batchnorm.DomainBatchNorm(2, ("a", "b"), dtype=torch.float64, activation="gelu").train(training)
    layer(torch.randn(4, 2).double(), domain="b")

    def call(x, weight, bias):
        parameters = {"b.weight": weight, "b.bias": bias}
        return torch.func.functional_call(copy.deepcopy(layer), parameters, (x,), {"domain": "b"})

    given = [torch.randn(s).double().requires_grad_() for s in ((3, 2, 2), (2,), (2,))]
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_the_innermost_says_it_and_the_argument_before_all() -> None:
    layer = batchnorm.DomainBatchNorm(2, ("a", "b", "c", "d"), default="d")
    net, x = nn.Sequential(layer), torch.randn(4, 2)

    def reached(**domain) -> str:
        before = {name: getattr(layer, name).num_batches_tracked.item() for name in layer.domains}
        net[0](x, **domain)
        (found,) = [n for n in layer.domains if getattr(layer, n).num_batches_tracked.item() != before[n]]
        return found

    assert reached() == "d"
    block = batchnorm.domain("a")
    with block:
        assert reached() == "a"
        with pytest.raises(ZeroDivisionError), batchnorm.domain("b"):
            assert reached() == "b"
            with block:
                assert reached() == "a"
                assert reached(domain="c") == "c"
            assert reached() == "b"
            raise ZeroDivisionError
        assert reached() == "a"
        with batchnorm.domain("b", batchnorm.DomainBatchNorm(2, ("a", "b"))):
            assert reached() == "a"
        with batchnorm.domain("b", net):
            assert reached() == "b"
    assert reached() == "d"


def test_no_domain_and_unknown_ones() -> None:
    layer, x = batchnorm.DomainBatchNorm(2, ("source", "target")), torch.randn(4, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        batchnorm.InputError, match=r"domain: got none, expected one of 'source', 'target'\. Write"
    ):
        layer(x)
    with pytest.raises(batchnorm.InputError, match=r"got 'Source', expected one of 'source', 'target'$"):
        layer(x, domain="Source")
    with batchnorm.domain("clean"), pytest.raises(batchnorm.InputError, match="got 'clean'"):
        layer(x)
    for wrong in (0, ["source"]):
        with pytest.raises(batchnorm.InputError, match="expected one of"):
            layer(x, domain=wrong)
        with pytest.raises(batchnorm.InputTypeError, match="the name of a domain"):
            batchnorm.domain(wrong)
    with pytest.raises(batchnorm.InputTypeError, match="domain: model"):
        batchnorm.domain("source", "net")
    with pytest.raises(batchnorm.InputError, match="should contain 3 elements"):
        layer(torch.randn(4, 3), domain="source")
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["clean", (), (1, 2), 3, None], ids=repr)
def test_domains_that_are_no_names(wrong) -> None:
    with pytest.raises(batchnorm.InputTypeError, match="domains: got"):
        batchnorm.DomainBatchNorm(2, wrong)


@pytest.mark.parametrize(
    "wrong", ["", "a.b", "train", "forward", "weight", "running_mean", "num_features", "a"]
)
def test_names_that_hide_something(wrong: str) -> None:
    with pytest.raises(batchnorm.InputError, match="domains: got"):
        batchnorm.DomainBatchNorm(2, ("a", wrong))


def test_other_bad_options() -> None:
    with pytest.raises(batchnorm.InputError, match="default: got 'c', expected None or one of 'a', 'b'"):
        batchnorm.DomainBatchNorm(2, ("a", "b"), default="c")
    with pytest.raises(batchnorm.InputError, match="activation"):
        batchnorm.DomainBatchNorm(2, activation="tanh")


def test_a_block_is_of_its_thread() -> None:
    layer, x = batchnorm.DomainBatchNorm(2, ("a", "b")), torch.randn(4, 2)
    meet, told = threading.Barrier(2), {}

    def work(name: str | None) -> None:
        try:
            if name is None:
                meet.wait(10)
                layer(x)
            else:
                with batchnorm.domain(name):
                    meet.wait(10)
                    layer(x)
        except batchnorm.InputError as error:
            told[name] = str(error)

    for pair in (("a", "b"), ("a", None)):
        threads = [threading.Thread(target=work, args=(name,)) for name in pair]
        with batchnorm.domain("b"):
            for each in threads:
                each.start()
            for each in threads:
                each.join()
    assert [layer.a.num_batches_tracked.item(), layer.b.num_batches_tracked.item()] == [2, 1]
    assert list(told) == [None]
    assert "in its thread" in told[None]


def test_one_parameter_for_all_domains_and_one_for_each() -> None:
    shared = batchnorm.DomainBatchNorm(2, ("a", "b"))
    assert [name for name, _ in shared.named_parameters()] == ["a.weight", "a.bias"]
    assert list(shared.state_dict())[5] == "b.weight"
    own = batchnorm.DomainBatchNorm(2, ("a", "b"), shared_affine=False, bias=False)
    assert [name for name, _ in own.named_parameters()] == ["a.weight", "b.weight"]
    assert not list(batchnorm.DomainBatchNorm(2, affine=False).parameters())
    x = torch.randn(4, 2)
    (own(x, domain="a") * torch.randn(4, 2)).sum().backward()
    assert own.a.weight.grad is not None
    assert own.b.weight.grad is None


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.half(), lambda m: m.to("cpu")],
)
def test_sharing_survives(copied) -> None:
    layer = batchnorm.DomainBatchNorm(2, ("a", "b"), default="b", eps=0.1)
    again = copied(layer)
    assert again.a.weight is again.b.weight
    assert again.a.bias is again.b.bias
    assert again.a.running_mean is not again.b.running_mean
    assert [again.default, again.domains, again.shared_affine, again.a.eps] == ["b", ("a", "b"), True, 0.1]
    x = torch.randn(4, 2).to(again.a.weight.dtype)
    torch.testing.assert_close(again.eval()(x), layer.eval()(x))
    own = copied(batchnorm.DomainBatchNorm(2, ("a", "b"), shared_affine=False))
    assert own.a.weight is not own.b.weight


def test_from_the_meta_device() -> None:
    layer = batchnorm.DomainBatchNorm(2, ("a", "b"), device="meta")
    layer.to_empty(device="cpu")
    assert layer.a.weight is layer.b.weight
    layer.reset_parameters()
    assert layer.a.weight.tolist() == layer.b.running_var.tolist() == [1, 1]
    layer(torch.randn(4, 2), domain="b")
    layer.reset_running_stats()
    assert layer.b.running_mean.tolist() == [0, 0]


def plain() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(2)
    for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        nn.init.uniform_(tensor, 1, 2)
    return layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_plain_checkpoint_fills_every_domain(shared: bool, assign: bool) -> None:
    torchs = plain()
    torchs.num_batches_tracked.fill_(7)
    state = nn.Sequential(nn.Identity(), torchs).state_dict()
    keys = list(state)
    net = nn.Sequential(nn.Identity(), batchnorm.DomainBatchNorm(2, ("a", "b", "c"), shared_affine=shared))
    net.load_state_dict(state, assign=assign)
    assert list(state) == keys
    x = torch.randn(3, 2, 2, 2)
    for name in "abc":
        torch.testing.assert_close(net.eval()[1](x, domain=name), torchs.eval()(x))
        assert getattr(net[1], name).num_batches_tracked == 7
    assert (net[1].a.weight is net[1].b.weight is net[1].c.weight) == shared
    net.train()[1](x, domain="b")
    assert torch.equal(net[1].a.running_mean, torchs.running_mean)
    assert not torch.equal(net[1].b.running_mean, torchs.running_mean)
    old = {name: value for name, value in torchs.state_dict().items() if "num" not in name}
    batchnorm.DomainBatchNorm(2).load_state_dict(old)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_its_own_checkpoint(shared: bool, assign: bool) -> None:
    layer = batchnorm.DomainBatchNorm(2, ("a", "b"), shared_affine=shared)
    for index, each in enumerate(layer.children()):
        nn.init.uniform_(each.weight, index, index + 1)
        each(torch.randn(4, 2) + index)
    again = batchnorm.DomainBatchNorm(2, ("a", "b"), shared_affine=shared)
    again.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    torch.testing.assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)
    assert (again.a.weight is again.b.weight) == shared
    assert again.a.weight.requires_grad
    assert again.a.running_mean is not again.b.running_mean


def test_checkpoints_that_do_not_fit() -> None:
    own = batchnorm.DomainBatchNorm(2, ("a", "b"), shared_affine=False)
    shared = batchnorm.DomainBatchNorm(2, ("a", "b"))
    own.load_state_dict(shared.state_dict())
    shared.load_state_dict(own.state_dict())  # the values are the same
    nn.init.normal_(own.b.bias)
    with pytest.raises(RuntimeError, match=r"a\.bias and those of the other domains: got values that differ"):
        shared.load_state_dict(own.state_dict())
    state = shared.state_dict()
    for name in ("b.weight", "b.bias"):  # a file that holds shared tensors once
        del state[name]
    shared.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"c\.running_mean"):
        batchnorm.DomainBatchNorm(2, ("a", "c")).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected.*a\.extra"):
        shared.load_state_dict({**state, "a.extra": torch.ones(1)})


def test_autocast() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.DomainBatchNorm(4, activation="relu"))
    x = torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), batchnorm.domain("adversarial"):
        y = net(x)
        h = net[0](x)
    assert y.dtype == torch.bfloat16
    assert same_bits(y, batchnorm.BatchNorm2d(4, activation="relu")(h))
    y.backward(torch.randn_like(y))
    assert net[1].clean.weight.grad.dtype == torch.float32


def test_a_checkpointed_part_opens_the_block_itself() -> None:
    """What is run again in backward has left the block; the error says so, and the docstring what to do."""
    net, x = nn.Sequential(nn.Linear(2, 2), batchnorm.DomainBatchNorm(2)), torch.randn(4, 2)

    def clean(x):
        with batchnorm.domain("clean"):
            return net(x)

    again = torch.utils.checkpoint.checkpoint(clean, x, use_reentrant=False)
    dy = torch.randn(4, 2)
    found = torch.autograd.grad(again, net[0].weight, dy)[0]
    torch.testing.assert_close(found, torch.autograd.grad(clean(x), net[0].weight, dy)[0])
    with batchnorm.domain("clean"):
        lost = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    with pytest.raises(batchnorm.InputError, match="got none"):
        lost.sum().backward()


def test_fx_takes_it_for_a_leaf_and_export_for_the_domain() -> None:
    net = nn.Sequential(nn.Linear(2, 3), batchnorm.DomainBatchNorm(3, ("a", "b"))).eval()
    net[1].b.running_mean.fill_(3)
    graph, x = torch.fx.symbolic_trace(net), torch.randn(4, 2)
    for name in ("a", "b"):
        with batchnorm.domain(name):
            expected = net(x)
            torch.testing.assert_close(graph(x), expected)
            program = torch.export.export(net, (x,))
        torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")  # the compiler's own
def test_compiled_once_for_each_domain() -> None:
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    net, x = nn.Sequential(batchnorm.DomainBatchNorm(3, ("a", "b")), nn.ReLU()), torch.randn(4, 3)
    plain, compiled = copy.deepcopy(net), torch.compile(net, fullgraph=True, backend=frames)
    for name in "abab":
        with batchnorm.domain(name):
            torch.testing.assert_close(compiled(x), plain(x))
    assert frames.frame_count == 2
    with batchnorm.domain("a"), batchnorm.domain("b", net):
        compiled(x)
        plain[0](x, domain="b")

    def both(x):
        with batchnorm.domain("a"):
            y = net(x)
        return y + net[0](x, domain="b")

    torch.testing.assert_close(
        torch.compile(both, fullgraph=True)(x), plain[1](plain[0](x, domain="a")) + plain[0](x, domain="b")
    )
    torch.testing.assert_close(net.state_dict(), plain.state_dict())
    with batchnorm.domain("a"):
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), plain[1](plain[0](x, domain="a")))


def test_inplace_and_what_it_says_of_itself() -> None:
    layer, x = batchnorm.DomainBatchNorm(2, ("a", "b"), default="a").eval(), torch.randn(4, 2)
    expected = layer(x)
    with torch.no_grad():
        y = layer(x, inplace=True)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, expected)
    assert "2, domains=('a', 'b'), shared_affine=True, default='a'" in repr(layer)


def test_a_domain_in_the_place_of_the_residual() -> None:
    layer = batchnorm.DomainBatchNorm(2, ("a", "b"), default="a")
    with pytest.raises(batchnorm.InputTypeError, match=r"layer\(input, domain='b'\)"):
        layer(torch.randn(4, 2), "b")  # type: ignore[arg-type]


def test_a_block_for_a_model_without_such_layers() -> None:
    with pytest.raises(batchnorm.InputError, match="a Linear without a DomainBatchNorm"):
        batchnorm.domain("a", torch.nn.Linear(2, 2))
    with pytest.raises(batchnorm.InputError, match="without a ConditionalBatchNorm"):
        batchnorm.condition(torch.zeros(2).long(), torch.nn.Linear(2, 2))
