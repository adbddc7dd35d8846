"""The machine in one line, as it stands above every table."""

from collections.abc import Mapping
from typing import Any

__all__ = ["where"]


def where(machine: Mapping[str, Any]) -> str:
    """Device, cores, versions, and what runs our layers."""
    commit = f", {machine['commit']}" if machine["commit"] else ""
    backend = f"; backend {machine['backend']}" if machine.get("backend") else ""
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads; torch {machine['torch']}; "
        f"batchnorm {machine['batchnorm']}{commit}{backend}."
    )
