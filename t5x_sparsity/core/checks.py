"""Checks of configured numbers: one clear ValueError that names the argument."""

import numbers


def check_share(name: str, value: object, *, closed: bool = True, hint: str = "") -> None:
    """Raises ValueError, with a `hint`, unless value is in [0, 1], or [0, 1) if not `closed`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (value == 1 and not closed):  # type: ignore[operator]  # a number
        raise ValueError(
            f"{name} must be a number in [0, 1{']' if closed else ')'}, got {value!r}"
            + (f"; {hint}" if hint else "")
        )


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError unless value is at least 0; NaN is not."""
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless value is above 0; NaN is not."""
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")


def check_integer(name: str, value: object, *, least: int, also: str = "") -> None:
    """Raises ValueError, which says what is `also` allowed, unless value is an int >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}{also}, got {value!r}")
