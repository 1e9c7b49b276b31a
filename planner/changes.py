"""What the closed form is made of: bytes that come and go on a device for the sake of a tensor."""

from __future__ import annotations

from typing import NamedTuple

HOST = "cpu"


class Change(NamedTuple):
    """Bytes allocated on a device (released, if negative) for the sake of a tensor."""

    device: str
    tensor: str
    nbytes: int
