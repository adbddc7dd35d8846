"""What the tests of the rules share."""

from typing import Any

import torch
from torch import nn

import batchnorm


def found(model: Any, code: str, **given: Any) -> tuple[batchnorm.Finding, ...]:
    """The findings of one rule, which must have had what it needs."""
    findings = batchnorm.check(model, select=code, **given)
    assert findings.ran == (code,), findings.not_run
    return tuple(findings)


def only(model: Any, code: str, **given: Any) -> batchnorm.Finding:
    findings = found(model, code, **given)
    assert len(findings) == 1, findings
    assert (findings[0].code, bool(findings[0].cause), bool(findings[0].fix)) == (code, True, True)
    return findings[0]


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and parameters as after a training, in every batch norm."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
                    if getattr(module, name) is not None:
                        getattr(module, name).uniform_(low, high, generator=generator)
                if module.running_mean is not None:
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                    module.num_batches_tracked.fill_(500)
    return model


def plain(*norms: nn.Module) -> nn.Sequential:
    """Convolutions without bias, each with one of these behind it."""
    layers: list[nn.Module] = []
    for norm in norms:
        layers += [nn.Conv2d(4, 4, 3, padding=1, bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers)


def sick() -> nn.Sequential:
    """Findings of every severity."""
    model = trained(
        plain(nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4, momentum=0.9), nn.BatchNorm2d(4, momentum=0.9))
    )
    model[1].running_mean[1] = torch.nan
    model[1].running_var[0] = 0
    return model
