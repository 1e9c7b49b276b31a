"""The settings of PyTorch's CUDA caching allocator, read from the string that `PYTORCH_ALLOC_CONF` holds.

The constants have the names that c10/core/AllocatorConfig.h gives them (torch 2.11 to 2.13); all sizes are bytes. Where torch
takes what it cannot mean (`max_split_size_mb:-5` becomes 2^44 MiB, an unknown key is skipped), this raises `AllocatorError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from ..tracer.errors import GroundplanError, nearest

MIB = 2**20

K_MIN_BLOCK_SIZE = 512
"""kMinBlockSize: all sizes are rounded up to a multiple of this."""

K_SMALL_SIZE = MIB
"""kSmallSize: the largest allocation that the small pool serves."""

K_SMALL_BUFFER = 2 * MIB
"""kSmallBuffer: small allocations are packed in segments (expandable ones: pages) of this size."""

K_LARGE_BUFFER = 20 * MIB
"""Once kLargeBuffer, now the default of `large_segment_size_mb`: segments for allocations below `K_MIN_LARGE_ALLOC`."""

K_MIN_LARGE_ALLOC = 10 * MIB
"""kMinLargeAlloc: from this size on an allocation gets a segment of its own size."""

K_ROUND_LARGE = 2 * MIB
"""kRoundLarge: such a segment's size is a multiple of this."""

ROUNDUP_INTERVALS = 16
"""kRoundUpPowerOfTwoIntervals: `roundup_power2_divisions` has an entry for each power of two from 1 MiB to 32 GiB."""

_WITHOUT_EFFECT = frozenset(
    {
        "graph_capture_record_stream_reuse",  # inside graph capture only
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "release_lock_on_cudamalloc",
    }
)
"""Options of the host's allocator, or of locking: they change no byte on the device."""


class AllocatorError(GroundplanError, ValueError):
    """A setting, an event or a snapshot that the caching allocator does not take; the message quotes it."""


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """How the allocator is set; the defaults are torch's. Sizes are bytes; None: no such limit.

    >>> AllocatorConfig.parse("max_split_size_mb:64, expandable_segments:True").max_split_size
    67108864
    """

    max_split_size: int | None = None
    max_non_split_rounding: int = K_LARGE_BUFFER
    roundup_power2_divisions: tuple[int, ...] = (0,) * ROUNDUP_INTERVALS
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    large_segment_size: int = K_LARGE_BUFFER
    per_process_memory_fraction: float = 1.0

    @classmethod
    def parse(cls, text: str) -> AllocatorConfig:
        """Reads `option:value,option:[interval:value,...]`, as torch does; raises `AllocatorError`, naming option and value."""
        options = dict(_options(text))
        # Torch reads this one first wherever it stands: the smallest value of two others depends on it.
        options = {key: options[key] for key in sorted(options, key=lambda key: key != "large_segment_size_mb")}
        config = cls()
        for option, value in options.items():
            config = _READERS[option](config, option, value) if option in _READERS else _without_effect(config, option, value)
        return config

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> AllocatorConfig:
        """What torch reads from the environment: `PYTORCH_ALLOC_CONF` before the older `PYTORCH_CUDA_ALLOC_CONF`.

        The one exception is `per_process_memory_fraction`, which CUDAAllocatorConfig.h looks for in the older one first.

        >>> AllocatorConfig.from_environment({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}).expandable_segments
        True
        """
        found = [environment[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in environment]
        configs = [cls.parse(text) for text in found] or [cls()]
        return replace(configs[0], per_process_memory_fraction=configs[-1].per_process_memory_fraction)

    def divisions(self, nbytes: int) -> int:
        """The divisions between two powers of two to which a request of `nbytes` is rounded; 0 and 1: none."""
        interval = nbytes.bit_length() - MIB.bit_length()
        return self.roundup_power2_divisions[min(max(interval, 0), ROUNDUP_INTERVALS - 1)]

    def round_size(self, nbytes: int) -> int:
        """`round_size`: the bytes of the block that a request of `nbytes` needs.

        >>> AllocatorConfig().round_size(1), AllocatorConfig().round_size(513)
        (512, 1024)
        """
        if nbytes < K_MIN_BLOCK_SIZE:
            return K_MIN_BLOCK_SIZE
        divisions = self.divisions(nbytes)
        if divisions > 1 and nbytes > K_MIN_BLOCK_SIZE * divisions:
            return next_division(nbytes, divisions)
        return -(-nbytes // K_MIN_BLOCK_SIZE) * K_MIN_BLOCK_SIZE

    def segment_size(self, size: int) -> int:
        """`get_allocation_size`: the bytes of the segment from which a block of `size` is cut.

        >>> [AllocatorConfig().segment_size(mib * 2**20) // 2**20 for mib in (1, 2, 9, 10, 11)]
        [2, 20, 20, 10, 12]
        """
        if size <= K_SMALL_SIZE:
            return K_SMALL_BUFFER
        if size < K_MIN_LARGE_ALLOC:
            return self.large_segment_size
        return -(-size // K_ROUND_LARGE) * K_ROUND_LARGE


def next_division(nbytes: int, divisions: int) -> int:
    """`roundup_power2_next_division`: up to the next of `divisions` equal steps between two powers of two.

    The example in the source's comment: four divisions between 1024 and 2048 are 1024, 1280, 1536 and 1792.

    >>> next_division(1200, 4)
    1280
    """
    floor = 1 << (nbytes.bit_length() - 1)
    step = floor >> (divisions.bit_length() - 1)
    if nbytes == floor:
        return nbytes
    return -(-nbytes // step) * step if step else floor << 1


# -- the syntax ---------------------------------------------------------------------------------------------------------


def _options(text: str) -> Iterator[tuple[str, str]]:
    """Each option with its value; a list keeps its brackets. White space counts nowhere."""
    seen: set[str] = set()
    for part in _split("".join(text.split())):
        option, colon, value = part.partition(":")
        if not colon or not value:
            raise AllocatorError(f"{part!r} in the allocator's settings {text!r} is not option:value")
        if option in seen:
            raise AllocatorError(f"{option} stands twice in the allocator's settings {text!r}")
        seen.add(option)
        yield option, value


def _split(text: str) -> Iterator[str]:
    """The parts between commas that are not inside brackets. A comma at the end separates nothing, as in torch."""
    depth, part = 0, ""
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            yield part
            part = ""
        else:
            part += letter
    if part:
        yield part


# -- the options --------------------------------------------------------------------------------------------------------


def _max_split_size(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    return replace(config, max_split_size=_at_least_a_segment(config, option, value))


def _max_non_split_rounding(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    return replace(config, max_non_split_rounding=_at_least_a_segment(config, option, value))


def _at_least_a_segment(config: AllocatorConfig, option: str, value: str) -> int:
    size, least = _whole(option, value) * MIB, config.large_segment_size
    return size if size >= least else _refuse(option, value, f"has to be at least {least // MIB}, the large segment's size")


def _large_segment_size(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    size = _whole(option, value) * MIB
    if size <= K_MIN_LARGE_ALLOC:
        _refuse(option, value, f"has to be more than {K_MIN_LARGE_ALLOC // MIB}")
    return replace(config, large_segment_size=size, max_non_split_rounding=size)


def _expandable_segments(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    if value not in ("True", "False"):
        _refuse(option, value, "has to be True or False, spelled so")
    return replace(config, expandable_segments=value == "True")


def _garbage_collection(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    threshold = _number(option, value)
    if not 0 < threshold < 1:
        _refuse(option, value, "has to be between 0 and 1")
    return replace(config, garbage_collection_threshold=threshold)


def _fraction(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    fraction = _number(option, value)
    if not 0 <= fraction <= 1:
        _refuse(option, value, "has to be from 0 to 1")
    return replace(config, per_process_memory_fraction=fraction)


def _backend(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    return config if value == "native" else _refuse(option, value, "is not modeled: only the native allocator's rules are known")


def _throw_on_oom(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    return config if value == "False" else _refuse(option, value, "is not modeled: leave it out")


def _roundup(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    """`4`, or `[64:8,128:2,>:1]`: the interval from 64 MiB on, all below the first as the first, `>`: all above the last."""
    if not value.startswith("["):
        return replace(config, roundup_power2_divisions=(_power_of_two(option, value, value),) * ROUNDUP_INTERVALS)
    if not value.endswith("]") or value.count("[") + value.count("]") != 2:
        _refuse(option, value, "has brackets that do not match")
    divisions, last, first = [0] * ROUNDUP_INTERVALS, 0, True
    for entry in filter(None, value[1:-1].split(",")):
        interval, _, text = entry.partition(":")
        division = 0 if text == "0" else _power_of_two(option, value, text)
        if interval == ">":
            divisions[last + 1 :] = [division] * (ROUNDUP_INTERVALS - last - 1)
            continue
        last = min(_power_of_two(option, value, interval).bit_length() - 1, ROUNDUP_INTERVALS - 1)
        if first:
            divisions[:last] = [division] * last
        divisions[last], first = division, False
    return replace(config, roundup_power2_divisions=tuple(divisions))


def _power_of_two(option: str, value: str, text: str) -> int:
    if not text.isdecimal() or int(text).bit_count() != 1:
        _refuse(option, value, f"has {text!r} where a power of two has to stand")
    return int(text)


def _whole(option: str, value: str) -> int:
    return int(value) if value.isascii() and value.isdecimal() else _refuse(option, value, "has to be a whole number")


def _number(option: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return _refuse(option, value, "has to be a number")


def _without_effect(config: AllocatorConfig, option: str, value: str) -> AllocatorConfig:
    if option not in _WITHOUT_EFFECT:
        known = [*_READERS, *_WITHOUT_EFFECT]
        raise AllocatorError(f"the allocator has no option {option!r} (set to {value!r}){nearest(option, known)}")
    return config


def _refuse(option: str, value: str, why: str) -> NoReturn:
    raise AllocatorError(f"the allocator's option {option}:{value} {why}")


_READERS: Mapping[str, Callable[[AllocatorConfig, str, str], AllocatorConfig]] = {
    "large_segment_size_mb": _large_segment_size,
    "max_split_size_mb": _max_split_size,
    "max_non_split_rounding_mb": _max_non_split_rounding,
    "roundup_power2_divisions": _roundup,
    "garbage_collection_threshold": _garbage_collection,
    "expandable_segments": _expandable_segments,
    "per_process_memory_fraction": _fraction,
    "backend": _backend,
    "throw_on_cudamalloc_oom": _throw_on_oom,
}
