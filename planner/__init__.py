"""The second stage: what to do with every tensor. Decides, and allocates nothing.

* `decisions`: `Decisions`, the frozen data that a plan saves (`plan_file`) and that fits its graph (`check`);
* `sharding` and `placing`: how a module is divided between ranks, or between one process's devices (`check_sharding`: its doors);
  `stages` of a pipeline, `experts` of a layer, and `local_parts`: what each rank holds of every tensor;
* `quantizing`: which layers are quantized while they are built, and how;
* `checkpointing`: which modules run again in the backward; `apart`: which layers are not alike for that, or for resharding;
* `cluster`: what a model is built on, of devices that `catalog` knows (`devices.toml`), each number with its source;
* `workload` and `inference`: what it is built for.

What that takes is `memory`'s noun, and `estimate` has the verbs that find it out, by `tiers`; each has `assumptions`:

* T0, the closed form: `construct` (of building), `rank_memory` (of one rank, by what is `held`: of tensors that are `alike`,
  once), `training_memory` (what training adds, with what `optimizers` take: `optimizer`, `adam`, `muon`), all of it as `changes`;
  activations by `activity`, from a `profile` of the module, by `step_form` and `fsdp_form` (`fsdp_units`), `schedules` and
  `pipeline_memory`, `exchanges` inside a layer;
* T1: `allocations`, what a run of the step without memory allocated and released; `rank_runs`: one run for each class of ranks
  (`ranks_alike`); `inference_memory` (`inference_parts`: of plans that shard, place, quantize) and `cuda_left_out`;
* T2: `allocator`, what PyTorch's CUDA caching allocator reserves for a sequence of `allocator_events`, set by an
  `allocator_config` (its parts: `allocator_blocks`, `allocator_driver`, `allocator_expandable`; recorded histories:
  `allocator_snapshot`); `replayed_run` and `reserved`: the same of a run and of a memory; `series`: either over time;
* T3: `verification`, what each phase took for real; `calibration`: verifications kept, by which rooms are `calibrated`;
* `verdict`: whether it fits a cluster; `overheads` and `process`: what a process holds besides, on a device and in host memory;
* `fit_serving`: the device map that fits: `partition`, exact, of a model as a `chain` of units; `choices`: which choice how many
  layers of a class take, as a mixed-integer program, for training to be fitted by;
* `records`: what all that is saved is made of; `kept`: what is worked out once for an object.
"""

from .check import check_decisions
from .cluster import Cluster
from .decisions import Cast, Decisions, Move, Rule, default_decisions
from .inference import Inference
from .memory import Binding, Memory
from .plan_file import load_decisions, save_decisions
from .verdict import Verdict
from .workload import Training

__all__ = [
    "Binding",
    "Cast",
    "Cluster",
    "Decisions",
    "Inference",
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
