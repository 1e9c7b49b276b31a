"""The third stage: done. Builds what the plan says, with the values that the eager constructor gives, and decides nothing.

* `materialize`: the verb, a second and real run of the constructor (`build`), guided by the tape;
* `guided`: the dispatch mode of that run: dead fills are left out, the others may wait (`waiting`);
* `steps`: the plan's casts and moves, done by calling `module.to`;
* `checkpointing`: modules that run again in the backward (`run_again`: one of them), by the plan or by the workload;
* `state`: some tensors only, or parts of them, from their recipes (`parts`, `windows`, `indexing`);
* `sources`: where the numbers come from: the eager stream (`filler`), or blocks with keys (`keyed`);
* `fill`, `pens`, `boxes`, `truncated`, `cuda`: which calls can be taken apart, and how a stretch or a box of one is drawn;
* `workers`, `pages`: threads, and huge pages for new memory;
* `check`: what must hold before and at the end.

A module that is divided between ranks is filled in place. `inplace` is that verb; it imports torch.distributed, which takes a
second, so it is imported when it is called:

* `options`: what the user says about values; `job`: what one call fills, from where and to where;
* `meta`: a module of meta tensors that remembers its plan; `parallel`: the plan's sharding, by torch's engines;
* `targets`, `regions`: what is to be filled, and which part of it is here; `placing`: how it gets there;
* `ranks`, `agreement`, `shared`: what the ranks tell each other;
* `modules`: one submodule at a time, for `fsdp1` and `zero3`, engines that divide each unit as soon as it has its values;
* `dispatch`: several devices in one process, by accelerate;
* `quantize`: layers quantized as soon as they are filled, by torchao or bitsandbytes (`quantizers`: one layer).

A training step without memory: `fake_step` is that verb, run when `plan.memory(..., tier="T1")` is asked for:

* `fake_tensors`: a module of fake tensors; `example_inputs`: what it is given; `training_step`: the step, on any tensors
  (`clipping`, `optimizers`: parts of it);
* `fake_inference`: the same of serving; `inference_step`: reading a prompt and decoding after it;
* `allocations`: what ops allocate and when it goes; `scratch`: what kernels take besides; `fake_ops`: fake ops mended;
* `cuda_kernels`: those that CUDA would choose (`cuda_attention`, `cuda_autocast`; `cuda_scratch`: what they take besides);
* `fake_ranks`: the same of one rank, in a `fake_world`; `fsdp_memory`, `gloo_scratch`, `ddp_buckets`: what engines take.

Its closed form needs a profile of the module: `profiles` keeps what `profiling` makes of forward and backward, `followed` op by
op, with layers that repeat run a few times only (`skipped_layers`), cut into blocks (`profile_blocks`); `microbatches`: in a
pipeline.

The same for real, held against what was predicted: `verify` is that verb, run when `plan.verify()` is asked for:

* `phase_checks`: what is measured beside what is predicted, and what the difference is;
* `recording`: spans of the run and what each took; `memory_events`, `process_peak`, `gloo_works`: where that is read;
* `watched`: a real step looked at op by op, and which of its pieces of memory are there at a peak.

A checkpoint is a source of values. `checkpoint` opens one by its form (`safetensors_form`, `torch_form`, `dcp_form`; `files`):

* `entries`: its tensors, any box of which is read into place; `hub`, `tiles`: those of a transformers model, converted;
* `matching`: which tensor comes from which entry; `loading`: reading them; `loaded`: `plan.materialize` with one;
* `saving`, `new_files`: writing one.
"""

from .build import Build
from .materialize import materialize
from .meta import meta_module
from .state import materialize_state

__all__ = ["Build", "materialize", "materialize_state", "meta_module"]
