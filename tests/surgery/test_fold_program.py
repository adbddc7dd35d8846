"""`fold` on exported programs: the same numbers in float64, a sound program, and what must be left alone."""

import warnings

import pytest
import torch
from surgery_helpers import notes, randomize, reasons
from torch import nn
from torch.nn import functional as F

import batchnorm


def export(
    net: nn.Module, *inputs: torch.Tensor, training: bool = False, **options
) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        return torch.export.export(net.train(training), inputs, **options)


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.run_decompositions()


def norms(program: torch.export.ExportedProgram) -> int:
    return sum("batch_norm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")


def outputs(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    found = program.module()(*inputs)
    return list(found) if isinstance(found, tuple | list) else [found]


def check(net: nn.Module, *inputs: torch.Tensor, left: int = 0, tmp_path=None) -> batchnorm.Changes:
    """Both forms of the program fold as they should, give what they gave, and can be saved."""
    net = randomize(net).double()
    inputs = tuple(each.double() for each in inputs)
    program = export(net, *inputs)
    for form in (program, decomposed(program)):
        before = {name: value.clone() for name, value in form.state_dict.items()}
        code = str(form.graph)
        changes = batchnorm.fold(form, inputs)
        folded = changes.model
        assert norms(folded) == left == len(changes.skipped)
        assert len(changes.changed) == norms(form) - left
        for old, new in zip(outputs(form, inputs), outputs(folded, inputs), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-11, atol=1e-11)
        assert str(form.graph) == code
        assert list(form.state_dict) == list(before)
        assert all(torch.equal(form.state_dict[name], value) for name, value in before.items())
        assert changes.revert() is form
        if tmp_path is not None:
            torch.export.save(folded, tmp_path / "folded.pt2")
            again = torch.export.load(tmp_path / "folded.pt2")
            for old, new in zip(outputs(folded, inputs), outputs(again, inputs), strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=0)
    return batchnorm.fold(program)


class Net(nn.Module):
    """Layers of every kind with batch norm behind and before them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, bias=False, padding="same")
        self.bn = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.up_bn = batchnorm.BatchNorm2d(4, activation="relu")
        self.pre = nn.BatchNorm2d(4)
        self.one = nn.Conv2d(4, 3, 1, bias=False)
        self.fc = nn.Linear(3, 5, bias=False)
        self.drop = nn.Dropout()
        self.fc_bn = nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        x = self.pre(self.up_bn(self.up(F.relu(self.bn(self.conv(x))))))
        return self.fc_bn(self.drop(self.fc(self.one(x).amax((2, 3))))), x.shape[0]


def test_all_kinds_of_layers(tmp_path) -> None:
    changes = check(Net(), torch.randn(2, 4, 5, 7), tmp_path=tmp_path)
    assert notes(changes) == {
        "bn": "folded into conv, which has a bias now",
        "up_bn": "folded into up",
        "pre": "folded into one, which has a bias now",
        "fc_bn": "folded into fc, which has a bias now",
    }
    assert sorted(changes.model.state_dict) == [
        "conv.bias",
        "conv.weight",
        "fc.bias",
        "fc.weight",
        "one.bias",
        "one.weight",
        "up.bias",
        "up.weight",
    ]
    assert changes.changed[0].before == "batch_norm(6, eps=1e-05)"


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), (2, 3, 6)),
        (nn.Conv3d(4, 6, 2, groups=2, stride=2), nn.BatchNorm3d(6, eps=0.3), (2, 4, 4, 5, 4)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2, output_padding=1, stride=2), nn.BatchNorm1d(6), (2, 4, 6)),
        (nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3), (1, 2, 3, 3, 3)),
        (nn.Conv2d(3, 4, (1, 3), padding=(0, 1), dilation=(1, 2)), nn.BatchNorm2d(4), (1, 3, 4, 9)),
    ],
)
def test_behind(layer, norm, shape) -> None:
    check(nn.Sequential(layer, norm, nn.Tanh()), torch.randn(shape))


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 2, groups=2), nn.BatchNorm1d(4), (2, 4, 6)),
        (nn.Conv2d(3, 4, 1, padding="same", bias=False), nn.BatchNorm2d(3), (2, 3, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 1, groups=2), nn.BatchNorm2d(4), (2, 4, 4, 5)),
        (nn.Linear(4, 3, bias=False), nn.BatchNorm1d(4), (5, 4)),
    ],
)
def test_before(layer, norm, shape) -> None:
    check(nn.Sequential(nn.Tanh(), norm, layer), torch.randn(shape))


def test_padding_keeps_a_shift_out_but_not_a_scale() -> None:
    net = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)).double()
    x = torch.randn(2, 3, 5, 5).double()
    changes = check(net, x, left=1)
    assert "cannot take its shift: the zeros that the layer pads" in reasons(changes)["1"]
    net[1].running_mean.zero_()
    nn.init.zeros_(net[1].bias)
    assert len(batchnorm.fold(export(net, x), x).changed) == 1


def test_a_chain_goes_into_one_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    changes = check(net, torch.randn(1, 3, 6, 6))
    assert [change.note for change in changes.changed] == ["folded into 0", "folded into 0"]


def test_names_that_are_none_in_python(tmp_path) -> None:
    net = nn.Sequential()
    net.add_module("block-1", nn.Conv2d(3, 4, 3, bias=False))
    net.add_module("norm", nn.BatchNorm2d(4))
    changes = check(net, torch.randn(1, 3, 6, 6), tmp_path=tmp_path)
    assert sorted(changes.model.state_dict) == ["block-1.bias", "block-1.weight"]


def test_one_before_several_layers() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.a, self.b = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, x):
            x = self.bn(x.sin())
            return self.a(x), self.b(x)

    changes = check(Split(), torch.randn(2, 3, 5, 5))
    assert notes(changes) == {"bn": "folded into a and b, which has a bias now"}


def test_dynamic_shapes_stay(tmp_path) -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    dim = torch.export.Dim("n", min=1, max=64)
    program = export(net, torch.randn(2, 3, 8, 8).double(), dynamic_shapes=({0: dim},))
    folded = batchnorm.fold(program).model
    torch.export.save(folded, tmp_path / "a.pt2")
    x = torch.randn(7, 3, 8, 8).double()
    again = torch.export.load(tmp_path / "a.pt2").module()(x)
    torch.testing.assert_close(again, net.eval()(x), rtol=1e-12, atol=1e-12)


class Shared(nn.Module):
    """The same convolution twice, the second time with batch norm; then one whose output goes elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.two, self.two_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.bn(self.conv(self.conv(x)))
        y = self.two(x.relu())
        return self.two_bn(y).relu(), y


def test_what_is_used_twice_stays() -> None:
    changes = check(Shared(), torch.randn(2, 3, 4, 4), left=2)
    assert reasons(changes) == {
        "bn": "conv2d (conv) comes before it: its weight is used elsewhere, too; relu comes after it",
        "two_bn": "the output of conv2d (two) goes elsewhere, too; relu comes after it",
    }


def test_a_bias_that_others_use_stays() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.bn(self.b(self.a(x)))

    program = export(randomize(Biased()).double(), torch.randn(1, 3, 2, 2).double())
    x = torch.randn(1, 3, 2, 2).double()
    folded = batchnorm.fold(program, x).model
    assert torch.equal(folded.state_dict["a.bias"], program.state_dict["a.bias"])
    assert "b.bias_folded" in folded.state_dict
    torch.testing.assert_close(folded.module()(x), program.module()(x), rtol=1e-12, atol=1e-12)


def test_statistics_of_the_batch_stay() -> None:
    x = torch.randn(4, 3)
    own = export(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), x)
    assert "no running statistics" in reasons(batchnorm.fold(own))["1"]
    training = export(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), x, training=True)
    for form in (training, decomposed(training)):
        changes = batchnorm.fold(form)
        assert "training mode" in reasons(changes)["1"]
        assert changes.model is form


def test_numbers_that_are_computed_or_given_stay() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, mean):
            y = F.batch_norm(self.conv(x), mean, self.bn.running_var)
            return self.bn(F.conv2d(y, self.conv.weight * 2))

    changes = batchnorm.fold(export(Computed(), torch.randn(1, 3, 2, 2), torch.zeros(3)))
    assert len(changes.skipped) == 2
    assert any("are computed or changed in the program" in reason for reason in reasons(changes).values())


def test_a_linear_layer_with_its_channels_last_stays() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    changes = batchnorm.fold(export(net, torch.randn(2, 3, 5)))
    assert "its channels lie on another axis" in reasons(changes)["1"]


def test_an_input_that_changes_in_between_stays() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            x = x.sin()
            y = self.bn(x)
            x.add_(1.0)
            return self.conv(y), x

    net = randomize(Changing()).double()
    x = torch.randn(1, 3, 2, 2).double()
    program = export(net, x)
    changes = batchnorm.fold(program, x)
    if any(
        getattr(node.target, "_schema", None) and node.target._schema.is_mutable
        for node in program.graph.nodes
    ):
        assert "may change its input in place" in reasons(changes)["bn"]
    functional = batchnorm.fold(decomposed(program), x)
    assert len(functional.changed) == 1


def test_a_branch_stays() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: self.bn(y).sin(), lambda y: y.cos(), (x,))

    changes = batchnorm.fold(export(Branch(), torch.randn(1, 3, 2, 2)))
    assert [skip.reason for skip in changes.skipped] == ["it stands in a branch or a loop"]


def test_preserved_calls_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    program = export(net, torch.randn(1, 3, 2, 2), preserve_module_call_signature=("1",))
    assert "a module whose calls the program preserves" in reasons(batchnorm.fold(program))["1"]


def test_numbers_that_do_not_fit_stay() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).half()
    net[1].running_var.fill_(1e-7)
    nn.init.constant_(net[1].weight, 60000.0)
    changes = batchnorm.fold(export(net, torch.randn(1, 1, 2, 2).half()))
    assert "does not fit its dtype" in reasons(changes)["1"]


def test_half_precision_is_rounded_once() -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(torch.bfloat16)
    weight, norm = net[0].weight.double(), net[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    folded = batchnorm.fold(export(net, torch.randn(1, 3, 5, 5).bfloat16())).model.state_dict
    assert torch.equal(folded["0.weight"], (weight * scale.reshape(-1, 1, 1, 1)).bfloat16())
    assert torch.equal(folded["0.bias"], (norm.bias - norm.running_mean.double() * scale).bfloat16())


def test_the_file(tmp_path) -> None:
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    torch.export.save(export(net, torch.randn(1, 3, 5, 5)), tmp_path / "net.pt2")
    changes = batchnorm.fold(tmp_path / "net.pt2", torch.randn(1, 3, 5, 5))
    assert norms(changes.model) == 0
    assert changes.notes[0].startswith("on the example, output: max abs error")


def test_bad_input(tmp_path) -> None:
    program = export(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3))
    with pytest.raises(batchnorm.InputError, match="inplace: got True with ExportedProgram"):
        batchnorm.fold(program, inplace=True)
    with pytest.raises(batchnorm.InputTypeError, match="got int"):
        batchnorm.fold(3)
    with pytest.raises(batchnorm.ModelError, match="on the example"):
        batchnorm.fold(program, torch.randn(4, 5))
    with pytest.raises(batchnorm.InputError, match="which is not there"):
        batchnorm.fold(tmp_path / "net.pt2")
    with pytest.raises(batchnorm.InputError, match=r"expected \.onnx or \.pt2"):
        batchnorm.fold(tmp_path / "net.pt")
    (tmp_path / "net.pt2").write_bytes(b"nothing")
    with pytest.raises(batchnorm.ModelError, match=r"a file that holds a \.pt2 model"):
        batchnorm.fold(str(tmp_path / "net.pt2"))
