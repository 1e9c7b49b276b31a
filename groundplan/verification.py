"""What `plan.verify` returns: predicted against measured, phase by phase, and what the difference consists of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .planner.calibration import Calibration, calibration_of
from .planner.checkpointing import check_said_once
from .planner.cluster import Cluster
from .planner.cuda_left_out import LEFT_OUT
from .planner.memory import Memory
from .planner.verification import Check, Part, RankChecks, worst
from .planner.workload import Training
from .runtime.checkpoint import Source
from .shown import Shown, bullets, heading, shortened, write_atomically
from .tracer.errors import DecisionError, MemoryRunError
from .units import format_bytes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .plan import Plan

_WIDEST = 44
_SHOWN_LARGEST = 2


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Shown):
    """A plan that was built, and trained, for real: what each phase took beside what was predicted. All sizes are bytes.

    `checks` are those of the rank that is off most, `rank(i)` those of any; `machine` is the kind of device that it ran on,
    and `left_out` what no prediction could know of its kernels and was measured with the rest.
    `module` is the module as the steps left it, with `plan.verify(keep=True)`, else None. `print(verification)` shows the table.
    """

    constructor: str
    ranks: tuple[RankChecks, ...]
    steps: int
    notes: tuple[str, ...] = ()
    communicators: int = 0
    left_out: tuple[str, ...] = ()
    module: Any = field(default=None, compare=False)

    @property
    def machine(self) -> str:
        """The kind of device: "cpu", or what the driver calls it."""
        return self.ranks[0].machine

    @property
    def shown_rank(self) -> RankChecks:
        """The rank with the check that is off most."""
        off = [(check, each) for each in self.ranks if (check := worst(each.checks)) is not None]
        found = worst(check for check, _ in off)
        return next((each for check, each in off if check is found), self.ranks[0])

    @property
    def checks(self) -> tuple[Check, ...]:
        """Those of the rank that is off most."""
        return self.shown_rank.checks

    @property
    def worst(self) -> Check | None:
        """The phase that is off most, in percent of what was predicted."""
        return worst(self.checks)

    def rank(self, index: int) -> RankChecks:
        """All that one rank measured."""
        return self.ranks[index]

    def check(self, phase: str, device: str | None = None) -> Check:
        """The check of a phase, on `device` or the one that holds most; raises `KeyError` for a phase that was not run."""
        found = [check for check in self.checks if check.phase == phase and device in (None, check.device)]
        if not found:
            raise KeyError(f"{phase} on {device or 'any device'} was not run; there are {', '.join(self._phases())}")
        return max(found, key=lambda check: check.measured)

    def _phases(self) -> list[str]:
        return list(dict.fromkeys(check.phase for check in self.checks))

    # -- other forms ----------------------------------------------------------------------------------------------------

    def calibration(self) -> Calibration:
        """What was measured, as something to predict with: `memory.fits(cluster, calibration=...)`."""
        return calibration_of(self.machine, self.ranks, self.communicators, self.left_out)

    def save_calibration(self, path: str | os.PathLike[str]) -> Calibration:
        """Add what was measured to the calibration at `path`, which is made where there is none; gives all that it then has.

        Raises `CalibrationError` for a file that is no calibration, or one of another kind of device or version of torch.
        """
        found = self.calibration()
        if os.path.exists(path):
            found = Calibration.load(path) + found
        found.save(path)
        return found

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The same as plain data; written to `path` as JSON as well, if one is given."""
        data = {
            "constructor": self.constructor,
            "machine": self.machine,
            "torch": torch.__version__,
            "steps": self.steps,
            "rank": self.shown_rank.rank,
            "ranks": [
                {"rank": each.rank, "checks": [check.to_json() for check in each.checks], "notes": list(each.notes)}
                for each in self.ranks
            ],
            "notes": list(self.notes),
        }
        if path is not None:
            write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return data

    def blocks(self, width: int) -> Iterator[RenderableType]:
        """What is shown, one below the other, none wider than `width` columns."""
        yield Text(shortened(self.constructor, width), style="bold")
        many = f", rank {self.shown_rank.rank} of {len(self.ranks)}, which is off most" if len(self.ranks) > 1 else ""
        yield Text(f"  on {self.machine}, {self.steps} steps{many}\n", style="dim")
        yield _table(self.checks)
        for check in self.checks:
            yield from _parts(check)
        notes = [*self.shown_rank.notes, *self.notes]
        if notes:
            yield heading("notes")
            yield from bullets(notes, style="dim")


def _table(checks: tuple[Check, ...]) -> Table:
    """Predicted against measured."""
    run, several = any(check.run is not None for check in checks), len({check.device for check in checks}) > 1
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("  phase", no_wrap=True)
    if several:
        table.add_column("device", no_wrap=True)
    reserved = any(check.reserved is not None for check in checks)
    for title in ("T0", *(["T1"] if run else []), "measured", "off", "%", *(["T2", "reserved"] if reserved else []), "whole"):
        table.add_column(title, justify="right", no_wrap=True)
    for check in checks:
        cells = [f"  {check.phase}", *([check.device] if several else []), format_bytes(check.closed_form)]
        cells += [_known(check.run)] if run else []
        cells += [format_bytes(check.measured), signed(check.difference), f"{check.percent:+.2f}"]
        cells += [_known(check.replayed), _known(check.reserved)] if reserved else []
        cells.append(format_bytes(check.whole))
        table.add_row(*cells, style=None if abs(check.percent) < 2 else "yellow" if check.difference < 0 else "bold red")
    return table


def _known(nbytes: int | None) -> str:
    return "" if nbytes is None else format_bytes(nbytes)


def _parts(check: Check) -> Iterator[RenderableType]:
    """What the difference of one phase consists of, where there is any."""
    parts = [part for part in check.parts if part.difference]
    if not parts or not check.difference:
        return
    yield heading(f"{check.phase} on {check.device}: {signed(check.difference)} against {check.tier}")
    yield from bullets(_line(part) for part in sorted(parts, key=lambda part: -abs(part.difference)))
    for name, nbytes in check.beyond.items():
        yield from bullets([f"besides: {name} {signed(nbytes)}"], style="dim", mark=" ")


def _line(part: Part) -> str:
    largest = ", ".join(f"{shortened(what, _WIDEST)} {signed(nbytes)}" for what, nbytes in part.largest[:_SHOWN_LARGEST])
    return f"{part.name}: {signed(part.difference)}{f' ({largest})' if largest else ''}"


def signed(nbytes: int) -> str:
    """Bytes with their sign.

    >>> signed(-1_500_000), signed(0)
    ('-1.50 MB', '0 B')
    """
    return f"{'-' if nbytes < 0 else '+' if nbytes else ''}{format_bytes(abs(nbytes))}"


# -- the verb -----------------------------------------------------------------------------------------------------------


def verified(
    plan: Plan,
    workload: Training | None,
    steps: int,
    seed: int | None,
    checkpoint: Source | None,
    saving: bool | None,
    keep: bool,
    mesh: DeviceMesh | None,
    timeout: float | None,
) -> Verification:
    """The verb behind `Plan.verify`."""
    from .runtime.phase_checks import Predicted
    from .runtime.verify import Job, states_kept, verify

    _check(plan, workload, steps)
    decisions, notes = plan.decisions, list[str]()

    def predicted(rank: int) -> Predicted:
        closed, run = plan.memory(workload).rank(rank), None if workload is None else _run(plan, workload, notes)
        return Predicted(closed, closed.changes, run if run is None else run.rank(rank))

    with states_kept():  # a forward may draw, and predicting runs it too
        known = plan.memory(workload)
        job = Job(
            build=lambda: plan.materialize(seed, checkpoint, progress=False, mesh=mesh, timeout=timeout),
            save=partial(plan.save_checkpoint, format="dcp" if decisions.sharding is not None else "safetensors"),
            training=workload,
            steps=steps,
            loads=checkpoint is not None,
            saving=False if decisions.placing is not None or decisions.quantizing else saving,
            sharded=decisions.sharding is not None,
            devices=tuple(known.devices),
        )
        ranks, module = verify(job, predicted, timeout)
    measured = tuple(each for each in known.left_out if each in LEFT_OUT)
    kept = module if keep else None
    return Verification(decisions.constructor, tuple(ranks), steps, tuple(notes), known.communicators, measured, kept)


def _check(plan: Plan, workload: Training | None, steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise DecisionError(f"steps is {steps!r}; it takes 2 at least, as only the second step is like all later ones")
    decisions = plan.decisions
    check_said_once(decisions.checkpointing, workload)
    if workload is not None and (decisions.placing is not None or decisions.quantizing):
        does = "places tensors on several devices" if decisions.placing is not None else "quantizes"
        raise DecisionError(f"the plan {does}, and is not trained; verify it without a workload")


def _run(plan: Plan, workload: Training, notes: list[str]) -> Memory | None:
    """T1's memory, T2's for a plan on CUDA; None, with a note, where the step cannot be run on fake tensors."""
    on_cuda = any(device.startswith("cuda") for device in plan.memory().devices)
    try:
        found = plan.memory(workload, tier="T2" if on_cuda else "T1", cluster=Cluster.here() if on_cuda else None)
    except (DecisionError, MemoryRunError) as error:
        notes.append(f"T1 could not be run, so that T0 is compared: {error}")
        return None
    return found if found.ranks == plan.memory().ranks else None
