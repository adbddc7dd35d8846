"""`averaged`: an average of a network's weights whose batch norms keep statistics that fit."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm._errors import InputError, InputTypeError, ModelError, message
from batchnorm.stats._targets import bare

__all__ = ["Averaged", "averaged"]


class Averaged(AveragedModel):
    """PyTorch's `AveragedModel` in eval mode; see `batchnorm.averaged`.

    `module` is the averaged network, `n_averaged` how often it was updated.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> average = batchnorm.averaged(net)
        >>> average.update_parameters(net)
        >>> average(torch.randn(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module, decay: float | None, device: torch.device | str | None) -> None:
        place = None if device is None else torch.device(device)
        rule = None if decay is None else get_ema_multi_avg_fn(decay)
        super().__init__(model, place, multi_avg_fn=rule)
        self.decay = decay
        for module in self.modules():
            module.training = False
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's weights and statistics into the average, the first time all of them.

        Raises:
            ModelError: another network than the one that this is the average of.
        """
        source = bare(model, "update_parameters")
        _check_same(self.module, source)
        count = int(self.n_averaged)
        weight = 1.0 if not count else 1 / (count + 1) if self.decay is None else 1 - self.decay
        before = [(mean.clone(), var.clone()) for mean, var in _statistics(self.module)]
        super().update_parameters(source)  # which copies every buffer
        for (mean, var), (old_mean, old_var) in zip(_statistics(self.module), before, strict=True):
            if count:
                mean.copy_(_moved(old_mean, mean, weight))
                var.copy_(_moved(old_var, var, weight))


def averaged(
    model: nn.Module, *, decay: float | None = None, device: torch.device | str | None = None
) -> Averaged:
    r"""A running average of a network's weights, for evaluation, with batch norms that fit it better than a copy.

    $$\theta \leftarrow (1 - w)\,\theta + w\,\theta_{\mathrm{model}}, \qquad w = \tfrac{1}{k+1} \text{ (SWA)}
    \text{ or } 1 - \mathrm{decay} \text{ (EMA)}$$

    It is PyTorch's `torch.optim.swa_utils.AveragedModel`, so its state dict, schedulers and loops go on working. What
    is different is what happens to buffers at `update_parameters`:

    - running_mean and running_var are averaged as the weights are, in float64. For a layer behind a linear one that is
      the averaged network's true mean, and a variance that is at most too large. PyTorch either copies those
      of the last model, or averages all buffers, integers too.
    - num_batches_tracked and every other buffer is copied from the model.

    The average is in eval mode and wants no gradient. Averaged statistics are an estimate of the averaged network's:
    where there are data, `batchnorm.recalibrate(average, loader)` at the end makes them exact. The farther apart the
    weights lie, as with equal weights over a long way (SWA), the more that is needed.

    Args:
        model: the network that is trained. In DistributedDataParallel or torch.compile it is found by itself.
        decay: the weight of the old average, above 0 and below 1, as 0.999; None for equal weights.
        device: where the average lives; None for the model's.

    Raises:
        InputError: `decay` out of range.
        InputTypeError: `model` is no module, `decay` no number.
        ModelError: scripted or sharded; in `update_parameters`, another network.

    Source:
        Izmailov et al., Averaging Weights Leads to Wider Optima, 2018, arXiv:1803.05407.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> average = batchnorm.averaged(net, decay=0.5)
        >>> for mean in (0.0, 1.0, 3.0):
        ...     _ = net[1].running_mean.fill_(mean)
        ...     average.update_parameters(net)
        >>> average.module[1].running_mean
        tensor([1.7500, 1.7500, 1.7500])
    """
    if decay is not None and (isinstance(decay, bool) or not isinstance(decay, int | float)):
        raise InputTypeError(message("decay", got=type(decay).__name__, expected="a number or None"))
    if decay is not None and not 0 < decay < 1:
        raise InputError(
            message("decay", got=decay, expected="above 0 and below 1", fix="None averages equally.")
        )
    return Averaged(bare(model, "averaged"), decay, device)


def _statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [
        (module.running_mean, module.running_var)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
    ]


def _moved(old: Tensor, new: Tensor, weight: float) -> Tensor:
    wide = torch.float32 if old.device.type == "mps" else torch.float64
    return old.to(wide).lerp(new.to(wide), weight)


def _check_same(own: nn.Module, other: nn.Module) -> None:
    def shapes(model: nn.Module) -> dict[str, Any]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: tuple(tensor.shape) for name, tensor in tensors}

    mine, its = shapes(own), shapes(other)
    if mine != its:
        names = sorted(name for name in {*mine, *its} if mine.get(name) != its.get(name))
        raise ModelError(
            message(
                "update_parameters",
                got=f"a model that differs in {names[0]}",
                expected="the network that this is the average of",
            )
        )
