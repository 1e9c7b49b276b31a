"""The driver's side of the caching allocator: a device's memory, what of it is taken, and where it is given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .allocator_config import AllocatorError

ADDRESS_SPACE = 2**47
"""Bytes of address space of an expandable segment on a device without a limit; torch takes 9/8 of the device's memory."""

_FIRST_ADDRESS = 2**40


@dataclass(frozen=True, slots=True)
class Device:
    """The memory of a device in bytes (None: no limit), and what others hold of it: contexts, libraries, other processes.

    `total` is `torch.cuda.get_device_properties(...).total_memory`. Raises `AllocatorError` for sizes that cannot be.
    """

    total: int | None = None
    taken: int = 0

    def __post_init__(self) -> None:
        if self.total is not None and self.total <= 0:
            raise AllocatorError(f"a device cannot have {self.total} bytes of memory; leave total out for no limit")
        if self.taken < 0 or (self.total is not None and self.taken > self.total):
            raise AllocatorError(f"others cannot hold {self.taken} bytes of a device of {self.total}")

    @property
    def address_space(self) -> int:
        """Bytes of address space for an expandable segment, before they are rounded up to its pages."""
        return ADDRESS_SPACE if self.total is None else self.total + self.total // 8


class Driver:
    """Gives memory until there is no more. `addresses` are those of the first segments, if they are known."""

    def __init__(self, device: Device, addresses: Iterable[int]) -> None:
        self.device = device
        self.reserved = 0
        self.peak = 0
        self._addresses = iter(addresses)
        self._next = _FIRST_ADDRESS

    @property
    def free(self) -> int | None:
        """Bytes that are left on the device; None: no limit."""
        return None if self.device.total is None else self.device.total - self.device.taken - self.reserved

    def reserve(self, nbytes: int) -> bool:
        """Takes memory, all or nothing; False where the device has not as much."""
        free = self.free
        if free is not None and nbytes > free:
            return False
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)
        return True

    def give_back(self, nbytes: int) -> None:
        """Memory goes back to the device."""
        self.reserved -= nbytes

    def address(self, nbytes: int) -> int:
        """Where a segment is: where it was, as far as that is known, and behind everything else otherwise."""
        address = next(self._addresses, self._next)
        self._next = max(self._next, address + nbytes)
        return address
