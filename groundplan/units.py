"""How numbers of bytes and of elements are written."""

from __future__ import annotations

from .planner.memory import human_bytes


def format_bytes(n: int) -> str:
    """`n` bytes in decimal units: GB is 10^9.

    >>> format_bytes(1_234_567_890), format_bytes(512)
    ('1.23 GB', '512 B')
    """
    return human_bytes(n)


def format_count(n: int) -> str:
    """`n` of something (parameters, elements, draws), exact below a thousand and rounded above.

    >>> format_count(405_853_388_800), format_count(1_240_000), format_count(768), format_count(999_999)
    ('405.9B', '1.24M', '768', '1.00M')
    """
    if n < 1000:
        return f"{n}"
    for unit, size in (("K", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)):
        if (value := round(n / size, 2)) < 10:
            return f"{value:.2f}{unit}"
        if (value := round(n / size, 1)) < 1000:
            break
    return f"{value:.1f}{unit}"
