"""BN002, BN003, BN005 to BN008: what the numbers of a layer say, in a model and in a state dict."""

import pytest
import torch
from rule_helpers import found, only, plain, trained
from torch import nn

import batchnorm

STATE_RULES = ("BN001", "BN002", "BN003", "BN006", "BN007", "BN008")


def net(**options) -> nn.Sequential:
    return trained(plain(nn.BatchNorm2d(4, **options), batchnorm.BatchNorm2d(4, **options)))


@pytest.mark.parametrize("code", [*STATE_RULES, "BN005"])
@pytest.mark.parametrize("make", [net, lambda: plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4))])
@pytest.mark.parametrize("mode", [True, False])
def test_healthy_layers_are_no_finding(code: str, make, mode: bool) -> None:
    model = make().train(mode)
    assert found(model, code) == ()
    if code in STATE_RULES:
        assert found(model.state_dict(), code) == ()


# BN002


def test_negative_variance_that_gives_nan() -> None:
    model = net()
    model[1].running_var[2] = -0.25
    finding = only(model, "BN002")
    assert (finding.module, finding.severity) == ("1", "error")
    assert finding.evidence == {"channels": 1, "of": 4, "lowest": -0.25, "nan": 1}
    assert "1 of 4 channels" in finding.message
    assert "NaN" in finding.message
    assert not model.eval()(torch.randn(2, 4, 5, 5)).isfinite().all()  # it is true


def test_negative_variance_in_a_state_dict_and_with_a_large_eps() -> None:
    model = net(eps=1e-3)
    model[4].running_var[:2] = torch.tensor([-4e-4, -2e-5])
    finding = only(model, "BN002")
    assert (finding.module, finding.severity, finding.evidence["nan"]) == ("4", "error", 0)
    assert "keeps them above 0" in finding.message
    assert model.eval()(torch.randn(2, 4, 5, 5)).isfinite().all()
    # A state dict does not say what eps is: PyTorch's default is taken.
    assert only(model.state_dict(), "BN002").evidence["nan"] == 2


def test_residue_of_rounding_is_only_mentioned() -> None:
    model = net()
    model[1].running_var[0] = -0.9e-7
    assert only(model, "BN002").severity == "info"
    model[1].running_var[0] = -1.1e-7
    assert only(model, "BN002").severity == "error"
    model[1].running_var[0] = 0
    assert found(model, "BN002") == ()
    model[1].running_var[0] = -torch.inf  # BN001's
    assert found(model, "BN002") == ()
    assert len(found(model, "BN001")) == 1


# BN003


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_a_warning_in_training_and_info_elsewhere(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    finding = only(model, "BN003")
    assert (finding.severity, finding.module, finding.also) == ("warning", "1", ("4",))
    assert str(dtype).removeprefix("torch.") in finding.message
    assert only(model.eval(), "BN003").severity == "info"
    assert only(model.state_dict(), "BN003").severity == "info"
    assert only(batchnorm.freeze(model.train()).model, "BN003").severity == "info"
    assert found(net().double(), "BN003") == ()


def test_parameters_in_half_precision_alone_are_no_finding() -> None:
    model = net()
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    assert found(model, "BN003") == ()


def test_rounding_of_a_mean_counts_in_sigmas() -> None:
    model = net().bfloat16().eval()
    with torch.no_grad():
        model[1].running_var[0], model[1].running_mean[0] = 1.0, 50.0  # half a unit is 0.125
    first, second = found(model, "BN003")
    assert (first.module, first.severity, second.severity) == ("1", "warning", "info")
    assert first.evidence["rounded"] == pytest.approx(0.125, rel=1e-3)
    model[1].running_mean[0] = 20.0  # and 0.0625
    assert {each.severity for each in found(model, "BN003")} == {"info"}


def test_variance_near_the_largest_float16() -> None:
    model = net().half().eval()
    model[1].running_var[3] = 60_000
    first, _ = found(model, "BN003")
    assert (first.severity, first.evidence["near"]) == ("warning", 1)
    model[1].running_var[3] = 58_000
    assert {each.severity for each in found(model, "BN003")} == {"info"}


@pytest.mark.parametrize(("momentum", "stuck"), [(0.1, False), (0.002, True)])
def test_statistics_that_cannot_move(momentum: float, stuck: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum).bfloat16())
    batches = [torch.randn(512, 3).mul(5**0.5).bfloat16() for _ in range(4)]
    model[0].running_var.fill_(2.5)
    finding = only(model, "BN003", batches=batches)
    assert finding.evidence["stuck"] == (3 if stuck else 0)
    before = model[0].running_var.clone()
    for batch in batches:
        model(batch)
    assert torch.equal(before, model[0].running_var) == stuck  # and so it is


@pytest.mark.parametrize(("var", "stuck"), [(4.5, 3), (4.97, 0)])
def test_stuck_is_what_is_off_by_more_than_two_percent(var: float, stuck: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.01).bfloat16())
    model[0].running_var.fill_(var)
    batches = [torch.randn(50_000, 3).mul(5**0.5).bfloat16() for _ in range(2)]
    assert only(model, "BN003", batches=batches).evidence["stuck"] == stuck


def test_what_has_arrived_is_not_stuck() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.003).bfloat16())
    batches = [torch.randn(4096, 3).bfloat16() for _ in range(4)]
    finding = only(model, "BN003", batches=batches)
    assert (finding.evidence["stuck"], finding.severity) == (0, "warning")


def test_variance_that_overflows_is_an_error() -> None:
    # float16 input up to 1,000: its variance is some 3e5.
    model = nn.Sequential(batchnorm.BatchNorm1d(2).half())
    batches = [torch.rand(64, 2).sub(0.5).mul(2000).half()]
    finding = only(model, "BN003", batches=batches)
    assert (finding.severity, finding.evidence["overflows"]) == ("error", 2)
    assert only(model, "BN003", batches=[batches[0] / 10]).severity == "warning"
    assert only(model.bfloat16(), "BN003", batches=[batches[0].bfloat16()]).severity == "warning"


# BN005


def test_eps_as_large_as_variances() -> None:
    model = net(eps=1e-3)
    model[1].running_var[:3] = torch.tensor([9.9e-4, 2e-5, 1.1e-3])
    model[4].running_var[0] = 5e-4
    finding = only(model, "BN005")
    assert (finding.severity, finding.module, finding.also) == ("info", "1", ("4",))
    assert finding.evidence == {"channels": 3, "of": 8, "layers": {"1": 2, "4": 1}}
    assert "3 of 8" in finding.message


def test_eps_beside_dead_channels_does_not_matter() -> None:
    model = net(eps=1e-3)
    model[1].running_var[:2] = torch.tensor([0, 9e-8])
    model[1].running_var[2] = 1e-4
    with torch.no_grad():
        model[1].weight[2] = 1e-6
    assert found(model, "BN005") == ()


def test_eps_of_zero() -> None:
    model = net(eps=0)
    info = only(model, "BN005")
    assert (info.severity, info.also) == ("info", ("4",))
    model[4].running_var[1] = 0
    error, info = batchnorm.check(model, select="BN005")
    assert (error.module, error.severity, error.evidence["channels"]) == ("4", "error", 1)
    assert info.severity == "info"
    assert not model.eval()(torch.randn(2, 4, 5, 5)).isfinite().all()


@pytest.mark.parametrize(("eps", "says"), [(1e-4, 1), (1e-6, 1), (9e-5, 0), (1.1e-6, 0)])
def test_eps_unlike_the_rest(eps: float, says: int) -> None:
    model = trained(plain(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=eps)))
    findings = found(model, "BN005")
    assert len(findings) == says
    assert all(each.module == "7" and each.severity == "info" for each in findings)


def test_eps_is_not_known_from_a_state_dict() -> None:
    findings = batchnorm.check(net().state_dict(), select="BN005")
    assert (findings.ran, list(findings.not_run)) == ((), ["BN005"])


# BN006


def untouched(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    return model


def test_statistics_at_their_start_beside_trained_weights() -> None:
    model = untouched(net())
    finding = only(model, "BN006")
    assert (finding.severity, finding.module, finding.also) == ("info", "1", ("4",))
    assert "weight and bias have been trained" in finding.message
    assert len(found(model.state_dict(), "BN006")) == 1
    old = {key: value for key, value in model.state_dict().items() if "tracked" not in key}
    assert len(found(old, "BN006")) == 1  # before PyTorch 0.4.1 there was no counter


@pytest.mark.parametrize("counter", [0, None])
@pytest.mark.parametrize("at_start", ["", "running_mean", "running_var"])
def test_a_count_of_zero_is_none_if_statistics_have_moved(counter: int | None, at_start: str) -> None:
    model, fresh = net(), nn.BatchNorm2d(4)
    for norm in (model[1], model[4]):
        norm.num_batches_tracked = None if counter is None else torch.tensor(counter)
        if at_start:
            getattr(norm, at_start).copy_(getattr(fresh, at_start))
    assert found(model, "BN006") == ()


def test_random_weights_of_a_fresh_gan_are_no_training() -> None:
    model = plain(nn.BatchNorm2d(4))
    nn.init.normal_(model[1].weight, 1.0, 0.02)
    assert found(model, "BN006") == ()
    nn.init.normal_(model[1].bias)
    assert len(found(model, "BN006")) == 1


@pytest.mark.parametrize(("bias", "says"), [(0.0, 0), (0.3, 1)])
def test_one_channel_has_nothing_to_differ_from(bias: float, says: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    nn.init.constant_(model[0].bias, bias)
    assert len(found(model, "BN006")) == says


def test_momentum_of_zero_throws_updates_away() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.0))
    assert found(model, "BN006") == ()
    model(torch.randn(8, 3) + 5)
    finding = only(model, "BN006")
    assert "momentum is 0" in finding.message
    assert "after 1 batches" in finding.message
    assert finding.fix.startswith("layer.momentum")


def test_steps_of_the_optimizer_count_as_use() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)).eval()
    optimizer = torch.optim.Adam(model.parameters())
    assert found(model, "BN006", optimizer=optimizer) == ()
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    assert "after 1 steps" in only(model, "BN006", optimizer=optimizer).message
    assert found(model, "BN006") == ()


def test_frozen_statistics_of_zero_and_one_may_be_folded_ones() -> None:
    assert found(batchnorm.freeze(untouched(net())).model, "BN006") == ()


# BN007


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_channel_without_a_finite_variance_is_not_dead(bad: float) -> None:
    model = net()
    model[1].running_var[2] = bad
    assert found(model, "BN007") == ()
    assert only(model, "BN001").module == "1"


def test_dead_channels_are_counted() -> None:
    model = net()
    with torch.no_grad():
        model[1].running_var[:2] = torch.tensor([0.0, 9e-10])
        model[4].weight[3] = 1e-5
    finding = only(model, "BN007")
    assert (finding.severity, finding.module, finding.also) == ("info", "1", ("4",))
    assert finding.evidence == {"channels": 3, "of": 8, "layers": {"1": 2, "4": 1}}
    assert "3 of 8 channels (38 %)" in finding.message
    assert only(model.state_dict(), "BN007").evidence == finding.evidence
    # A dead channel is constant at the output.
    y = model[1].eval()(torch.randn(8, 4, 3, 3) * model[1].running_var.sqrt()[:, None, None])
    assert (y.std((0, 2, 3)) < 0.02).tolist() == [True, True, False, False]


def test_small_channels_are_not_dead() -> None:
    model = net()
    with torch.no_grad():
        model[1].running_var[:2] = torch.tensor([2e-9, 1e-6])
        model[4].weight.copy_(torch.tensor([1.0, 2e-3, 1.0, 1.0]))
    assert found(model, "BN007") == ()


def test_zero_initialized_residual_branches_are_not_dead() -> None:
    model = net()
    nn.init.zeros_(model[4].weight)
    assert found(model, "BN007") == ()
    nn.init.constant_(model[4].weight[:1], 1.0)
    assert only(model, "BN007").evidence["channels"] == 3


def test_dead_without_statistics_or_without_weight() -> None:
    model = trained(
        nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4, affine=False))
    )
    assert found(model, "BN007") == ()
    with torch.no_grad():
        model[0].weight[0] = 0
    model[1].running_var[1] = 0
    assert only(model, "BN007").evidence["layers"] == {"0": 1, "1": 1}


# BN008


@pytest.mark.parametrize(("mean", "says"), [(1001.0, 1), (-1001.0, 1), (999.0, 0)])
def test_mean_of_many_sigmas(mean: float, says: int) -> None:
    model = net()
    model[1].running_mean[0], model[1].running_var[0] = mean, 1.0
    findings = [*found(model, "BN008"), *found(model.state_dict(), "BN008")]
    assert len(findings) == 2 * says
    for finding in findings:
        assert (finding.module, finding.severity, finding.evidence["channels"]) == ("1", "info", 1)


def test_one_pass_is_off_where_it_says_and_not_where_it_is_silent() -> None:
    """The threshold: E[x²] − E[x]² in float32 against float64."""

    def off(offset: float) -> float:
        x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + offset
        one_pass = (x * x).mean() - x.mean() ** 2
        return float((one_pass - x.double().var()).abs() / x.double().var())

    # Where the rounding falls is chance: the worst of ten offsets.
    assert max(off(1000 + 50 * step) for step in range(10)) > 0.02
    assert max(off(100 + 5 * step) for step in range(10)) < 0.005


def test_constant_channels_are_held_against_eps() -> None:
    model = net()
    model[1].running_mean[0], model[1].running_var[0] = 3.0, 0.0  # √eps is 0.0032
    assert found(model, "BN008") == ()
    model[1].running_mean[0] = 3.3
    assert len(found(model, "BN008")) == 1
    model[1].running_var[0] = -1.0  # BN002's
    assert found(model, "BN008") == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    """Against the next number of the dtype."""
    from batchnorm.checks.rules.bn003 import _half_unit

    values = torch.tensor([0.0, 1e-9, 1e-6, 0.7, 1.0, 1.5, 2.0, 100.0, 30000.0], dtype=dtype)
    following = (values.view(torch.int16) + 1).view(dtype)
    expected = (following.double() - values.double()) / 2
    torch.testing.assert_close(_half_unit(values.double(), dtype), expected, rtol=0, atol=0)
    torch.testing.assert_close(_half_unit(-values.double(), dtype), expected, rtol=0, atol=0)


def test_a_mean_of_zero_beside_a_dead_channel_is_not_rounded() -> None:
    model = net().bfloat16().eval()
    model[1].running_mean[0] = model[1].running_var[0] = 0
    assert only(model, "BN003").severity == "info"
