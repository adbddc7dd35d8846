"""What several rules say in the same words: parts of a model, code for them, counts."""

from collections.abc import Iterable

__all__ = ["USUAL_EPS", "code_for", "count", "parts", "share"]

USUAL_EPS = 1e-5  # PyTorch's default, where a state dict does not tell


def parts(names: Iterable[str], every: Iterable[str]) -> tuple[str, ...]:
    """The largest parts of a model all of whose layers are among `names`, "" for the whole.

    Of a.b, a.c and d.e among a.b, a.c, d.e and d.f these are a and d.e.
    """
    meant = list(names)
    others = set(every) - set(meant)
    found: dict[str, None] = {}
    for name in meant:
        steps = name.split(".")
        for length in range(len(steps) + 1):
            part = ".".join(steps[:length])
            if not any(not part or other == part or other.startswith(f"{part}.") for other in others):
                found[part] = None
                break
    return tuple(found)


def code_for(part: str) -> str:
    """The part of a model as one writes it in Python."""
    if not part:
        return "model"
    if all(step.isidentifier() for step in part.split(".")):
        return f"model.{part}"
    return f'model.get_submodule("{part}")'


def count(number: int, noun: str) -> str:
    """A number of things: 1 layer, 17,056 layers."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def share(number: int, of: int) -> str:
    """A part of a whole in percent, with one digit below 10."""
    percent = 100 * number / of
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"
