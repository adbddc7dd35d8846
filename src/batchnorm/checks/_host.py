"""Numbers of many layers brought to the CPU together: a device is waited for once, not once a number."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["on_host"]


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of them in float64 on the CPU, in one transfer a device."""
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        # (no float64 on Apple's GPUs)
        if tensor.device.type == "mps":
            found[place] = tensor.detach().cpu().double()
        else:
            places.setdefault(tensor.device, []).append(place)
    for there in places.values():
        parts = [tensors[place].detach().flatten().to(torch.float64) for place in there]
        together = torch.cat(parts).cpu()
        for place, part in zip(there, together.split([each.numel() for each in parts]), strict=True):
            found[place] = part.view(tensors[place].shape)
    return found
