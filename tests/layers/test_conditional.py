"""ConditionalBatchNorm: γ and β of each sample, by its class or given by the caller."""

import copy
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import ACTIVATIONS, SLOPE, lay_out
from torch import Tensor, nn

import batchnorm

SHAPES = [(6, 3), (5, 3, 4), (5, 3, 4, 3), (4, 3, 2, 3, 2)]
CLASSES = 4
# x̂, and then the result, are rounded to half a unit in the last place of the largest value.
ROOM = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def slow(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    running: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The formula for each sample and each channel by itself; `weight` and `bias` are (N, C)."""
    rows = []
    valid = torch.ones(x.shape[0], *x.shape[2:], dtype=x.dtype) if mask is None else mask.to(x.dtype)
    for c in range(x.shape[1]):
        n = valid.sum()
        if running is None:
            mean = (x[:, c] * valid).sum() / n
            var = ((x[:, c] - mean).square() * valid).sum() / n
        else:
            mean, var = running[0][c], running[1][c]
        for i in range(x.shape[0]):
            z = (x[i, c] - mean) / (var + eps).sqrt() * weight[i, c] + bias[i, c]
            z = z if residual is None else z + residual[i, c]
            if activation == "leaky_relu":
                z = F.leaky_relu(z, SLOPE)
            elif activation is not None:
                z = getattr(F, activation)(z)
            rows.append(torch.where(valid[i] > 0, z, torch.zeros_like(z)))
    return torch.stack(rows).reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def layer_of(
    num_classes: int | None = CLASSES, dtype=torch.float64, **options
) -> batchnorm.ConditionalBatchNorm:
    layer = batchnorm.ConditionalBatchNorm(3, num_classes, dtype=dtype, negative_slope=SLOPE, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "residual-mask"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_gradients_and_statistics(shape, activation, extras: bool, training: bool) -> None:
    layer = layer_of(activation=activation, momentum=0.3)
    layer(torch.randn(shape).double() * 2 + 1, torch.randint(CLASSES, shape[:1]))
    running = (layer.running_mean.clone(), layer.running_var.clone())
    layer.train(training)
    x = (torch.randn(shape).double() * 3 + 2).requires_grad_()
    labels = torch.randint(CLASSES - 1, shape[:1])  # the last class has no sample
    residual = torch.randn(shape).double().requires_grad_() if extras else None
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if extras else None
    y = layer(x, labels, residual, mask)
    truth = slow(
        x, layer.class_weight[labels], layer.class_bias[labels], residual, mask, activation,
        None if training else running,
    )  # fmt: skip
    dy = torch.randn(shape).double()
    wanted = [each for each in (x, layer.class_weight, layer.class_bias, residual) if each is not None]
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(y, wanted, dy)
    for one, other in zip(found, torch.autograd.grad(truth, wanted, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert not found[1][-1].any()
    assert not found[2][-1].any()
    values = x.detach().movedim(1, -1)[mask if mask is not None else slice(None)].reshape(-1, 3)
    if training:
        running = (0.7 * running[0] + 0.3 * values.mean(0), 0.7 * running[1] + 0.3 * values.var(0))
    torch.testing.assert_close((layer.running_mean, layer.running_var), running)
    assert layer.num_batches_tracked == 1 + training


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("given", [False, True], ids=["classes", "given"])
@pytest.mark.parametrize("dtype", list(ROOM), ids=str)
def test_rounding(dtype: torch.dtype, given: bool, extras: bool, layout: str) -> None:
    """γ and β stay as wide as they are: rounded to a half type beforehand, they would cost more than allowed."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = layer_of(None if given else CLASSES, wide)
    x = lay_out((torch.randn(6, 3, 4, 5) * 2 + 1).to(dtype), layout).requires_grad_()
    residual = torch.randn(6, 3, 4, 5).to(dtype) if extras else None
    labels = torch.randint(CLASSES, (6,))
    # γ so near to 1 and β to 0 that only their wide values say by how much.
    pair = ((1 + torch.randn(6, 3) / 1000).to(wide), (torch.randn(6, 3) / 1000).to(wide))
    weight, bias = pair if given else (layer.class_weight[labels], layer.class_bias[labels])
    y = layer(x, pair if given else labels, residual)
    dense = x.detach().double().requires_grad_()
    truth = slow(dense, weight.double(), bias.double(), None if residual is None else residual.double())
    assert y.dtype == dtype
    assert layout == "sliced" or y.stride() == x.stride()
    assert relative(y.detach(), truth) <= ROOM[dtype]
    dy = torch.randn(6, 3, 4, 5).to(dtype)
    dx, expected = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(truth, dense, dy.double())[0]
    assert dx.dtype == dtype
    assert relative(dx, expected) <= 2 * ROOM[dtype]


def test_gradients_of_the_classes_are_as_wide_as_they_are() -> None:
    layer = layer_of(dtype=torch.float32)
    x, dy = torch.randn(64, 3, 8, 8).bfloat16(), torch.randn(64, 3, 8, 8).bfloat16()
    labels = torch.randint(CLASSES, (64,))
    layer(x, labels).backward(dy)
    xhat = slow(x.double(), torch.ones(64, 3), torch.zeros(64, 3))
    for name, terms in (("class_weight", dy.double() * xhat), ("class_bias", dy.double())):
        found = getattr(layer, name).grad
        expected = torch.stack([terms[labels == k].sum((0, 2, 3)) for k in range(CLASSES)])
        assert found.dtype == torch.float32
        # x̂ is rounded, the sum over 1,000 elements is not.
        assert relative(found, expected) <= (2e-6 if name == "class_bias" else 2.0**-8)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("given", [False, True], ids=["classes", "given"])
def test_gradcheck(given: bool, activation: str | None, training: bool) -> None:
    layer = layer_of(None if given else CLASSES, activation=activation).train(training)
    labels, mask = torch.tensor([0, 2, 2, 1]), torch.rand(4, 3) > 0.2
    x, residual = (torch.randn(4, 3, 3).double().requires_grad_() for _ in range(2))
    rows = (4, 3) if given else (CLASSES, 3)
    weight, bias = (torch.randn(rows).double().requires_grad_() for _ in range(2))

    def call(x, weight, bias, residual):
        again = copy.deepcopy(layer)
        if given:
            return again(x, (weight, bias), residual, mask)
        parameters = {"class_weight": weight, "class_bias": bias}
        return torch.func.functional_call(again, parameters, (x, labels, residual, mask))

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias, residual))


def test_what_stands_under_the_mask_reaches_nothing() -> None:
    layer = layer_of(activation="silu")
    x, residual = (torch.randn(4, 3, 5).double() for _ in range(2))
    labels, mask = torch.tensor([0, 1, 2, 3]), torch.ones(4, 5, dtype=torch.bool)
    mask[1, 2:] = mask[3] = False
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        given = [torch.where(mask.unsqueeze(1), each, poison).requires_grad_() for each in (x, residual)]
        y = copy.deepcopy(layer)(given[0], labels, given[1], mask)
        assert not y[1, :, 2:].any()
        torch.manual_seed(1)
        dy = torch.where(mask.unsqueeze(1), torch.randn_like(y), poison)
        own = layer(given[0], labels, given[1], mask)
        results.append((y, *torch.autograd.grad(own, [*given, layer.class_weight, layer.class_bias], dy)))
    assert all(each.isfinite().all() for each in results[0])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_weights_as_a_mask_are_frequencies() -> None:
    x, labels = torch.randn(4, 3, 2).double(), torch.tensor([0, 1, 2, 3])
    layer = layer_of()
    mask = torch.tensor([[2.0, 1.0], [1.0, 1.0], [3.0, 1.0], [1.0, 0.0]])
    y = layer(x, labels, mask=mask)
    counted = torch.cat([x[i, :, j].repeat(int(mask[i, j]), 1) for i in range(4) for j in range(2)])
    expected = (x - counted.mean(0).view(3, 1)) / (counted.var(0, correction=0) + 1e-5).sqrt().view(3, 1)
    expected = expected * layer.class_weight.unsqueeze(2) + layer.class_bias.unsqueeze(2)
    torch.testing.assert_close(y, torch.where(mask.unsqueeze(1) > 0, expected, 0))


def test_the_same_as_a_plain_layer_where_all_have_one_class() -> None:
    plain = batchnorm.BatchNorm2d(3, activation="relu", nonfinite="skip")
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    layer = batchnorm.ConditionalBatchNorm(3, CLASSES, activation="relu", nonfinite="skip")
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 5, 5)
    x[0, 1, 0, 0] = float("nan")
    for _ in range(2):
        torch.testing.assert_close(layer(x, torch.tensor([2] * 4)), plain(x), equal_nan=True)
        torch.testing.assert_close(layer.running_mean, plain.running_mean)
    assert layer.running_mean.isfinite().all()
    assert layer.single == "error"
    one = torch.randn(1, 3)
    with pytest.raises(batchnorm.InputError, match="more than 1 value per channel"):
        layer(one, torch.tensor([0]))
    zero = layer_of(dtype=torch.float32, single="zero")
    torch.testing.assert_close(zero(one, torch.tensor([1])), zero.class_bias[1:2])


def test_condition_from_a_block() -> None:
    net, x = nn.Sequential(nn.Linear(2, 3), layer_of(dtype=torch.float32), nn.ReLU()), torch.randn(4, 2)
    labels, others = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, 3, 3])
    layer = net[1]
    outside = layer(net[0](x), others)
    with batchnorm.condition(labels):
        torch.testing.assert_close(net(x), layer(net[0](x), labels).relu())
        torch.testing.assert_close(layer(net[0](x), others), layer(net[0](x), condition=others))
        assert not torch.equal(layer(net[0](x), others), layer(net[0](x), labels))
        torch.testing.assert_close(layer(net[0](x), others), outside)
        with pytest.raises(ZeroDivisionError), batchnorm.condition(others, net):
            torch.testing.assert_close(net(x), layer(net[0](x), others).relu())
            raise ZeroDivisionError
        with batchnorm.condition(others, layer_of(dtype=torch.float32)), batchnorm.domain("clean"):
            torch.testing.assert_close(net(x), layer(net[0](x), labels).relu())
        told = []

        def work() -> None:
            with pytest.raises(batchnorm.InputError, match="got none"):
                net(x)
            told.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert told
    with pytest.raises(
        batchnorm.InputError, match=r"got none, expected a tensor of 4 integers from 0 to 3.*Give it"
    ):
        net(x)
    film = batchnorm.ConditionalBatchNorm(3)
    with batchnorm.condition((torch.full((4, 3), 2.0), torch.ones(4, 3))):
        y = film(net[0](x))
    torch.testing.assert_close(y.mean(0), torch.ones(3))


LABELS = torch.tensor([0, 1, 2, 3])
PAIR = (torch.ones(4, 3), torch.ones(4, 3))
BAD = [
    (CLASSES, LABELS + 1, batchnorm.InputError, "got class 4, expected a tensor of 4 integers from 0 to 3"),
    (CLASSES, LABELS - 1, batchnorm.InputError, "got class -1"),
    (CLASSES, LABELS[:3], batchnorm.InputError, r"shape \(3,\)"),
    (CLASSES, LABELS.reshape(4, 1), batchnorm.InputError, r"shape \(4, 1\)"),
    (CLASSES, LABELS.float(), batchnorm.InputTypeError, "torch.float32"),
    (CLASSES, LABELS > 1, batchnorm.InputTypeError, "torch.bool"),
    (CLASSES, [0, 1, 2, 3], batchnorm.InputTypeError, "got list"),
    (CLASSES, PAIR, batchnorm.InputTypeError, "got tuple"),
    (CLASSES, LABELS.to("meta"), batchnorm.InputError, "device meta"),
    (None, LABELS, batchnorm.InputTypeError, "got Tensor, expected a pair"),
    (
        None,
        None,
        batchnorm.InputError,
        r"got none, expected a pair of tensors \(weight, bias\), both of shape",
    ),
    (None, PAIR[:1], batchnorm.InputTypeError, "got tuple, expected a pair"),
    (None, (PAIR[0], LABELS), batchnorm.InputTypeError, "condition: bias: got torch.int64"),
    (None, (PAIR[0], None), batchnorm.InputTypeError, "condition: bias: got NoneType"),
    (None, (PAIR[0][:1], PAIR[1]), batchnorm.InputError, r"condition: weight: got shape \(1, 3\)"),
    (None, (PAIR[0], PAIR[1].to("meta")), batchnorm.InputError, "condition: bias: got device meta"),
]


@pytest.mark.parametrize(("num_classes", "condition", "error", "text"), BAD)
def test_bad_conditions(num_classes, condition, error, text: str) -> None:
    layer = layer_of(num_classes, torch.float32)
    with pytest.raises(error, match=text):
        layer(torch.randn(4, 3), condition)
    assert layer.num_batches_tracked == 0


def test_other_bad_input() -> None:
    layer, x = layer_of(dtype=torch.float32), torch.randn(4, 3)
    with pytest.raises(batchnorm.InputError, match="residual"):
        layer(x, LABELS, x[:1])
    with pytest.raises(batchnorm.InputError, match="should contain 4 elements"):
        layer(torch.randn(4, 4), LABELS)
    assert layer.num_batches_tracked == 0
    for wrong, error in (
        (0, batchnorm.InputError),
        (2.0, batchnorm.InputTypeError),
        (True, batchnorm.InputTypeError),
    ):
        with pytest.raises(error, match="num_classes"):
            batchnorm.ConditionalBatchNorm(3, wrong)
    with pytest.raises(batchnorm.InputTypeError, match="condition: got int"):
        batchnorm.condition(3)
    with pytest.raises(batchnorm.InputTypeError, match="condition: model"):
        batchnorm.condition(LABELS, "net")


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints(assign: bool) -> None:
    plain = nn.BatchNorm1d(3)
    for tensor in (plain.weight, plain.bias, plain.running_mean, plain.running_var):
        nn.init.uniform_(tensor, 1, 2)
    layer, x = batchnorm.ConditionalBatchNorm(3, CLASSES), torch.randn(4, 3)
    state = plain.state_dict()
    layer.load_state_dict(state, assign=assign)
    assert "weight" in state
    torch.testing.assert_close(layer.eval()(x, LABELS), plain.eval()(x))
    first = plain.weight.tolist()
    layer.class_weight.data[1] = 7
    assert layer.class_weight[0].tolist() == plain.weight.tolist() == first
    again = batchnorm.ConditionalBatchNorm(3, CLASSES)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.eval()(x, LABELS), layer(x, LABELS))
    assert list(layer.state_dict())[:2] == ["class_weight", "class_bias"]
    with pytest.raises(RuntimeError, match="class_weight"):
        batchnorm.ConditionalBatchNorm(3, 5).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected.*weight"):
        batchnorm.ConditionalBatchNorm(3).load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_words(copied) -> None:
    layer = layer_of(dtype=torch.float32, activation="relu", bias=False)
    x = torch.randn(4, 3)
    torch.testing.assert_close(copied(layer)(x, LABELS), layer(x, LABELS))
    assert layer.class_bias is None
    assert "3, eps=1e-05, momentum=0.1, num_classes=4, bias=False" in repr(layer)
    assert "num_classes=None," in repr(batchnorm.ConditionalBatchNorm(3))
    layer.reset_parameters()
    assert layer.class_weight.tolist() == [[1] * 3] * 4
    with pytest.raises(batchnorm.ModelError, match="convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))


def test_autocast() -> None:
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6)
    layer = layer_of(dtype=torch.float32, activation="gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(conv(x), LABELS, mask=torch.rand(4, 4, 4) > 0.2)
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert layer.class_weight.grad.dtype == torch.float32


def test_function_transforms() -> None:
    layer = layer_of(None).eval()
    x = torch.randn(5, 4, 3).double()
    weight, bias = torch.randn(2, 5, 4, 3).double()
    expected = torch.stack([layer(x[i], (weight[i], bias[i])) for i in range(5)])
    torch.testing.assert_close(torch.vmap(lambda *a: layer(a[0], a[1:]))(x, weight, bias), expected)
    alone = torch.vmap(lambda b: layer(x[0], (weight[0], b)))(bias)
    torch.testing.assert_close(alone[2], layer(x[0], (weight[0], bias[2])))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")  # the compiler's own
def test_compiled() -> None:
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(nn.Sequential(layer_of()), fullgraph=True, backend=frames)
    for shift in range(3):
        with batchnorm.condition((LABELS + shift) % CLASSES):
            counted(torch.randn(4, 3).double())
    assert frames.frame_count == 1
    layer = layer_of(dtype=torch.float32, activation="silu")
    plain, compiled = copy.deepcopy(layer), torch.compile(nn.Sequential(layer), fullgraph=True)
    for labels in (LABELS, LABELS.flip(0)):
        x = torch.randn(4, 3, 5)
        dy = torch.randn(4, 3, 5)
        with batchnorm.condition(labels):
            y = compiled(x)
        y.backward(dy)
        truth = plain(x, labels)
        truth.backward(dy)
        torch.testing.assert_close(y, truth)
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
