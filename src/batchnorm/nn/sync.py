"""SyncBatchNorm: the statistics of all processes of a group."""

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist

from batchnorm import ops
from batchnorm._errors import InputTypeError, message
from batchnorm._validation import Single
from batchnorm.nn.batch_norm import NonFinite
from batchnorm.nn.families import Family, register
from batchnorm.nn.member import Member
from batchnorm.policies.sync import Synced

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(Member):
    r"""Batch normalization over the batches of all processes of a group, for input with any number of axes.

    $$y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \varepsilon}} \cdot \gamma + \beta +
    \mathrm{residual}\right)$$

    In training, mean and biased variance are those of all processes' batches together, as if one process had them all,
    and so are the running statistics; the gradient goes through them to every process. In eval nothing is exchanged.
    Without `torch.distributed`, before `init_process_group`, and in a group of one process it is plain batch norm.

    For training with a few samples per process, whose statistics would be noise: detection, segmentation, video,
    large models. Wrong to use where each process has some dozens of samples already: each layer then waits for the
    slowest process twice a step, and gains nothing. (The positions of one image are alike; it is samples that count.)
    Works on every backend and device of torch.distributed, gloo on a CPU included, and under DistributedDataParallel.
    (`torch.nn.SyncBatchNorm` needs a GPU.)

    The exchange is one collective forward and one backward a layer, without waiting for the device: mean, m2 = Σ(x −
    mean)² and count in float64, whatever the input's dtype, merged by Chan's formula in the order of the ranks. So the
    counts may differ, a process may have an empty batch (it must call the layer all the same, and take part in
    backward), masks with weights are counted as they are, a large mean cancels nothing, and all processes hold the
    same bits. Among more than 64 processes it is a sum about the running mean, whose size does not grow with their
    number; the running means must then be the same everywhere, and an error tells where they are not.

    The gradients of γ and β are those of the process's own part, as everywhere; DistributedDataParallel averages them.
    Second derivatives and function transforms (`torch.func`) are refused. Where a process calls its layers in another
    order than the rest, or in eval mode, everyone waits, or takes the numbers of another layer of the same width:
    run the first steps of a training in `batchnorm.check_sync`, which tells who and where.

    Args:
        num_features: C, the channels of the input.
        eps: ε, added to the variance.
        momentum: weight of the new batch in the running statistics; None for the plain average over all batches.
        affine: learn γ (`weight`) and β (`bias`).
        track_running_stats: keep running statistics; without them eval uses the process's own batch, and exchanges
            nothing.
        process_group: the processes to work with; None for all of them. A process outside the group works alone.
        device: where parameters and buffers live.
        dtype: of parameters and buffers.
        bias: learn β; without it β is 0.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish" or "gelu".
        negative_slope: slope of leaky_relu below 0.
        nonfinite: with "skip", a channel whose batch statistics are NaN or infinite leaves its running statistics
            alone; "propagate" is PyTorch's behaviour.
        single: what training does with one value per channel in all processes together: "error" (PyTorch's),
            "running" (the running statistics, which stay), or "zero" (a variance of 0). "error" holds on a CPU;
            elsewhere the number is not waited for, and the variance is 0.
        backend: None for the best one, or one that `batchnorm.explain_backend` lists.

    Shape:
        input and `residual`: (N, C) or (N, C, *S), N ≥ 0. `mask`: (N, *S), or what broadcasts to it: True, or a weight
        taken as a frequency, where the input is valid. Output: the input's.

    Raises:
        InputError: shapes or options that do not fit, or one value per channel in training.
        InputTypeError: integer or complex input, or a `process_group` that is none.
        ModelError: second derivatives, function transforms, or running means that differ between the processes.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167; over processes: Peng et al., MegDet, 2017,
        arXiv:1711.07240.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.SyncBatchNorm(3, activation="relu")
        >>> layer(torch.randn(8, 3, 6, 6)).shape  # one process: plain batch norm
        torch.Size([8, 3, 6, 6])
    """

    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        nonfinite: NonFinite = "propagate",
        single: Single = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            negative_slope=negative_slope,
            nonfinite=nonfinite,
            single=single,
            backend=backend,
        )
        if not _is_group(process_group):
            raise InputTypeError(
                message(
                    "process_group",
                    got=type(process_group).__name__,
                    expected="a torch.distributed.ProcessGroup, or None for all processes",
                )
            )
        self.process_group = process_group

    def _policy(self) -> ops.Policy | None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group
        if dist.get_world_size(group) < 2:  # -1 outside the group
            return None
        tracking = self.track_running_stats
        running = (self.running_mean, self.running_var) if tracking else (None, None)
        return Synced(group, running, self.single)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        """A copy in the same group: a group cannot be copied."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        memo[id(self.process_group)] = self.process_group
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def extra_repr(self) -> str:
        """The other layers' text, and the group if it is not that of all processes."""
        text = super().extra_repr()
        return text if self.process_group is None else f"{text}, process_group={_name(self.process_group)}"


def _is_group(group: Any) -> bool:
    if group is None or not dist.is_available():
        return group is None
    return group is dist.GroupMember.NON_GROUP_MEMBER or isinstance(group, dist.ProcessGroup)


def _name(group: Any) -> str:
    return str(getattr(group, "group_name", "of other processes"))


register(Family("sync", dict.fromkeys((1, 2, 3), SyncBatchNorm)))
