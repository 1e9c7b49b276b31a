"""The second stage: what to do with every tensor. Decides, and allocates nothing.

* `decisions`: `Decisions`, the frozen data that a plan saves (`plan_file`) and that fits its graph (`check`);
* `sharding` and `placing`: how a module is divided between ranks, or between one process's devices (`check_sharding`: its doors);
* `quantizing`: which layers are quantized while they are built, and how;
* `memory`: the bytes of every phase, before anything is built, for the weights or for a `workload` (`construct`: of building;
  `rank_memory`: of one rank; `training_memory`: what training adds, with what `optimizers` take: `optimizer`, `adam`, `muon`);
* `allocator`: what PyTorch's CUDA caching allocator reserves for a sequence of `allocator_events`, set by an `allocator_config`
  (its parts: `allocator_blocks`, `allocator_driver`, `allocator_expandable`; recorded histories: `allocator_snapshot`);
* `reserved`: the same of `memory`'s phases; `overheads`: what a process holds beside its tensors;
* `cluster`: what a model is built on, of devices that `catalog` knows (`devices.toml`), each number with its source;
* `verdict`: whether they fit a cluster; `process`: what a process holds in host memory besides;
* `verification`: what each phase took for real beside that; `calibration`: verifications kept, which `calibrated` rooms go by;
* `allocations`: what a training step allocates and releases, as a run of it without memory found;
* `rank_runs`: one such run for each class of ranks;
* `records`: what all that is saved is made of.
"""

from .check import check_decisions
from .cluster import Cluster
from .decisions import Cast, Decisions, Move, Rule, default_decisions
from .memory import Binding, Memory
from .plan_file import load_decisions, save_decisions
from .verdict import Verdict
from .workload import Training

__all__ = [
    "Binding",
    "Cast",
    "Cluster",
    "Decisions",
    "Memory",
    "Move",
    "Rule",
    "Training",
    "Verdict",
    "check_decisions",
    "default_decisions",
    "load_decisions",
    "save_decisions",
]
