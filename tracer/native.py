from __future__ import annotations

from typing import Any


def native() -> Any:
    return None
