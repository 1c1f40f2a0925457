"""Checks of settings: each names the class, the setting and the value, and says what would be right."""

from collections.abc import Callable, Collection, Sequence
from math import inf, isfinite
from typing import Any

from latentdm.errors import UserError


class Check:
    """Checks the settings of one class, in its constructor.

    Every check returns the value, so that it stands where the value is stored.

    Args:
        owner: the class that an error names.

    Example:
        >>> Check("RandomMask").integer("boxes", 3, 1, 32)
        3
        >>> Check("RandomMask").integer("boxes", 0, 1, 32)
        Traceback (most recent call last):
        latentdm.errors.UserError: RandomMask: boxes must be an integer in 1…32, got 0
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def fail(self, setting: str, expected: str, value: object, hint: str = "") -> UserError:
        """The error that ``setting`` must be ``expected``, for a caller to raise; ``hint`` names a remedy."""
        shown = list(value) if isinstance(value, tuple) else value  # as Hydra has it
        return UserError(f"{self.owner}: {setting} must be {expected}, got {shown!r}{hint and f'; {hint}'}")

    def integer(self, setting: str, value: Any, low: int, high: int | None = None, hint: str = "") -> int:
        """An integer of at least ``low`` and, unless None, at most ``high``. A bool is none."""
        if type(value) is not int or value < low or (high is not None and value > high):
            raise self.fail(setting, f"an integer{_bounds(low, high)}", value, hint)
        return value

    def number(self, setting: str, value: Any, low: float = -inf, high: float = inf, hint: str = "") -> float:
        """A finite number in ``low…high``, both included. A bool is none."""
        if not _is_number(value) or not isfinite(value) or not low <= value <= high:
            raise self.fail(setting, f"a number{_bounds(low, high)}", value, hint)
        return float(value)

    def probability(self, setting: str, value: Any) -> float:
        """A number in 0…1."""
        if not _is_number(value) or not 0 <= value <= 1:
            raise self.fail(setting, "a probability in 0…1", value)
        return float(value)

    def choice(self, setting: str, value: Any, choices: Collection[str]) -> str:
        """One of some texts."""
        if not isinstance(value, str) or value not in choices:
            raise self.fail(setting, f"one of {', '.join(choices)}", value)
        return value

    def integers(
        self, setting: str, values: Sequence[int], low: int, high: int | None = None, hint: str = ""
    ) -> tuple[int, int]:
        """The smallest and the largest of a range of integers, in order, both in ``low…high``."""
        if _is_pair(values) and all(type(value) is int for value in values):
            first, last = values
            if low <= first <= last and (high is None or last <= high):
                return first, last
        raise self.fail(setting, f"two integers{_bounds(low, high)}, in order", values, hint)

    def numbers(
        self,
        setting: str,
        values: Sequence[float],
        expected: str,
        valid: Callable[[float, float], bool],
        hint: str = "",
    ) -> tuple[float, float]:
        """Two numbers for which ``valid(first, second)`` holds; ``expected`` says in words what that means."""
        if _is_pair(values) and all(map(_is_number, values)) and valid(*values):
            return float(values[0]), float(values[1])
        raise self.fail(setting, f"two numbers {expected}", values, hint)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(values: object) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 2


def _bounds(low: float, high: float | None) -> str:
    if low == -inf and high == inf:
        return ""
    if high is None or high == inf:
        return f" of at least {_bound(low)}"
    return f" of at most {_bound(high)}" if low == -inf else f" in {_bound(low)}…{_bound(high)}"


def _bound(value: float) -> str:
    return f"{value:g}".replace("-", "−")
