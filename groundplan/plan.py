"""The live handle on one model: what the constructor creates, what is decided about it, and how to build it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from .explain import Explanation, explain
from .forecast import Workload, forecast
from .planner.allocator_config import AllocatorConfig
from .planner.calibration import Calibration
from .planner.check import check_decisions
from .planner.check_sharding import check_axes
from .planner.checkpointing import checkpoint_rules
from .planner.cluster import Cluster, cluster_of
from .planner.decisions import Decisions, default_decisions
from .planner.fitted import workload_of
from .planner.inference import Inference
from .planner.memory import Memory
from .planner.placing import placing
from .planner.plan_file import load_decisions, save_decisions
from .planner.quantizing import Filter
from .planner.sharding import LAYERS, ROLES, Reshard, Schedule, matches, sharding
from .planner.speeds import Speeds
from .planner.step_time import StepTime
from .planner.tiers import Tier
from .planner.workload import Checkpointing, Training
from .progress import shown
from .report import Report
from .runtime import Build, materialize_state, meta_module
from .runtime import materialize as materialize_plan
from .runtime.checkpoint import Rename, Source
from .runtime.materialize import Progress as ProgressCallback
from .runtime.options import Options
from .tracer.errors import DecisionError, MaterializeError, PlanFileError
from .tracer.graph import ParamGraph

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .diff import PlanDiff
    from .fitting_training import Dtypes
    from .verification import Verification


def trace(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Run `build(*args, **kwargs)` without allocating, and plan to build what it creates.

    The constructor runs unmodified; torch's ambient settings (default dtype, default device, grad mode) are honored. `build`
    returns an `nn.Module`, or a tuple or dict of them. Random generators and torch's settings are afterwards as they were.

    Raises whatever the constructor raises, unchanged; `TraceError` for what a trace cannot follow.

    >>> plan = trace(torch.nn.Linear, 3, 4)
    >>> [(tensor.name, tensor.shape) for tensor in plan.graph]
    [('weight', (4, 3)), ('bias', (4,))]
    """
    return Plan(None, Build.trace(build, args, kwargs))


@dataclass(frozen=True)
class Plan:
    """What a constructor creates and what is to be done with it. Immutable: each method that decides returns a new plan.

    Made by `trace`; one made by `Plan.load` has decisions only, until `bind` gives it its constructor again.
    """

    _decided: Decisions | None = field(default=None, repr=False)
    _build: Build | None = field(default=None, repr=False)
    _workload: Workload | None = field(default=None, repr=False, compare=False)

    @cached_property
    def decisions(self) -> Decisions:
        """What has been decided, as plain data; for a fresh trace, to build what the constructor builds, as it builds it."""
        if self._decided is not None:
            return self._decided
        build = self._bound  # only now, as the graph's fingerprint takes a while that many a trace can do without
        return default_decisions(build.graph, _name_of(build.function), build.bound_state)

    # -- looking --------------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> ParamGraph:
        """What the constructor creates; raises `PlanFileError` for a loaded plan that is not bound."""
        return self._bound.graph

    def report(
        self,
        workload: Workload | None = None,
        cluster: Cluster | str | None = None,
        *,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        tier: Tier = "T0",
        allocator: AllocatorConfig | str | None = None,
    ) -> Report:
        """What there is, in a form that prints well: tensors, init functions, bytes, memory.

        With a `workload` the memory is that of training or serving, with a `cluster` it says as well whether that fits
        (`Memory.fits`), and with both how long a step of training takes (`step_time`). `tier` and `allocator` are as in `memory`,
        and raise the same; `calibration` is as in `Memory.fits`.

        >>> print(trace(torch.nn.Linear, 3, 4).report())  # doctest: +ELLIPSIS
        torch.nn.modules.linear.Linear
        ...
        >>> trace(torch.nn.Linear, 3, 4).report(cluster="64GB-cpu").verdict.verdict
        'fits'
        """
        if calibration is not None and cluster is None:
            raise DecisionError("calibration= is for saying whether it fits; say what: report(cluster=..., calibration=...)")
        found = self.memory(workload, tier=tier, allocator=allocator, cluster=cluster)
        verdict = None if cluster is None else found.fits(cluster, calibration=calibration)
        return Report(self.graph, self.decisions, found, verdict, self._time(workload, cluster))

    def explain(self, name: str | None = None) -> Explanation:
        """One tensor's recipe with its source lines; without a name, every decision with its reason.

        Of a plan that `fit` decided: what it was fitted to, the verdict, the speed, why each decision was taken, and the layouts
        that were tried beside the chosen one. Decisions of your own are told apart from those of the search.

        Raises `UnknownNameError`, with the nearest names.

        >>> print(trace(torch.nn.Linear, 3, 4).explain("bias"))  # doctest: +ELLIPSIS
        bias
        ...
        """
        return explain(self.graph, self.decisions, name, self._left_whole() if name is None else ())

    def memory(
        self,
        workload: Workload | None = None,
        *,
        tier: Tier = "T0",
        allocator: AllocatorConfig | str | None = None,
        cluster: Cluster | str | None = None,
    ) -> Memory:
        """The peak bytes of every phase by device: of the weights, or of training or serving them, as `workload` says.

        Without one it is that of the workload given to `fit`, or of the weights alone.

        `tier="T0"` is a closed form. Activations are in it by one traced forward and backward of each kind of layer, which is
        kept for further calls; where that cannot be, they are left out, and a note says why. `tier="T1"` runs forward, loss,
        backward and optimizer of the plan's module twice, on fake tensors: nothing is allocated, and all that would be is
        counted, to the byte on the CPU. Of a plan that shards it is the step of rank 0, under torch's own FSDP2 and tensor
        parallelism in a process group that talks to nobody; your own process groups stay as they are. `rank(i)` of the result
        runs that rank's, if its parts have other shapes. Plans that place or quantize have the closed form only.
        `workload.inputs` are the inputs of that step, of one rank, or are made from the module's signature. `tier="T2"` replays
        that run through the rules of CUDA's caching allocator: `reserved` beside active bytes.

        With `gp.Inference` every tier runs forward on fake tensors, for the prompt and for tokens after it: some seconds for 80
        layers. In T0 what a plan shards, places or quantizes is applied to that run by rule, and the weights alone are given
        where forward looks at values.

        `allocator` says how that is set, as in PYTORCH_ALLOC_CONF: `"expandable_segments:True"`; None is as torch sets it. In T0
        it asks for `reserved` as well, of what is there at the peaks. `cluster` says for which devices, as workspaces differ.

        Raises `DecisionError` for a tier, a plan or inputs with which it cannot be run, `AllocatorError` for settings that torch
        does not take, and `MemoryRunError` where the step looks at values, such as `if x.max() > 1`.

        >>> trace(torch.nn.Linear, 3, 4).memory().phases
        {'construct': 64, 'load': 64, 'checkpoint': 64}
        >>> trace(torch.nn.Linear, 3, 4).memory(Training("sgd", batch_size=2), tier="T1").phases["optimizer"]
        152
        >>> trace(torch.nn.Linear, 3, 4).shard({"dp": 2}).memory(Training("sgd", batch_size=2), tier="T1").phases["optimizer"]
        88
        >>> trace(torch.nn.Linear, 3, 4).memory(Inference(batch_size=2)).phases["step"]
        120
        >>> on_gpu = trace(torch.nn.Linear, 3, 4).to("cuda").memory(Training("sgd", batch_size=2), tier="T2")
        >>> on_gpu.phases["optimizer"], on_gpu.reserved["optimizer"]["cuda:0"].reserved // 2**20
        (152, 68)
        """
        return forecast(self._bound, self.decisions, self._workload_of(workload), tier, allocator, cluster)

    def step_time(self, workload: Training, cluster: Cluster | str | None = None, *, speeds: Speeds | None = None) -> StepTime:
        """The seconds of one training step of each rank, predicted: computation, communication that is waited for, optimizer.

        Operations and bytes are those of every op of one traced forward and backward (`plan.memory`'s profile). How fast they are
        is said by a `cluster`, from its devices' datasheets and published shares of their peaks, or by `speeds`, as
        `gp.measure_speeds()` measures them on a machine, which goes before. What FSDP2 gathers and reduces, and DDP's buckets, go
        on beside the computation; collectives of tensor parallelism are waited for. Times are good for comparing plans: a
        published step of Llama 3.1 8B on 8 H100 takes a quarter longer than is said here (docs/decisions/027).

        Raises `DecisionError` without a cluster or speeds, for a cluster with fewer devices than the plan has ranks, for a plan
        of the CPU on devices of CUDA or the other way round, for axes other than replicate, shard and tensor ones, and where
        forward and backward cannot be traced.

        >>> plan = trace(torch.nn.Linear, 4096, 4096).to("cuda")
        >>> time = plan.step_time(Training("sgd", batch_size=4096), "1xH100-80GB")
        >>> print(time)  # doctest: +ELLIPSIS
        5... ms a step: compute ..., optimizer ...
        """
        from .timing import step_time_of

        return step_time_of(self._bound, self.decisions, workload, cluster, speeds)

    def diff(
        self,
        other: Plan,
        workload: Workload | None = None,
        cluster: Cluster | str | None = None,
        *,
        tier: Tier = "T0",
        speeds: Speeds | None = None,
    ) -> PlanDiff:
        """What another plan of the same constructor decides differently, with memory by phase and step times side by side.

        Decisions are compared by what they mean: two patterns that checkpoint the same layers are no difference. Memory is that
        of `workload`, or else of what each plan was fitted to, micro-batches included, or of the weights alone; times are those
        of `step_time`, on `cluster`, or on the one that a plan was fitted to, or by `speeds`. `tier` is as in `memory`. A plan
        that was loaded and not bound is taken for this one's constructor.

        Raises `DecisionError` for plans of different constructors or arguments, and what `memory` raises.

        >>> plan = trace(lambda: torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))))
        >>> plan.diff(plan.cast(torch.bfloat16)).differences
        (Difference(what='casts', this='none', other='cast to bfloat16'),)
        >>> bool(plan.shard({"dp": 2}).diff(plan.shard({"dp": 2}, units=["0-2"])))
        False
        """
        from .diff import diff

        return diff(self, other, workload, cluster, tier, speeds)

    # -- deciding -------------------------------------------------------------------------------------------------------

    def cast(self, dtype: torch.dtype | Mapping[str, torch.dtype]) -> Plan:
        """Convert floating-point and complex parameters and buffers: the same as `build().to(dtype)`.

        A mapping gives a dtype per pattern of tensor names, the first match first:
        `{"*norm*": torch.float32, "*": torch.bfloat16}`. Raises `DecisionError` for a dtype that `nn.Module.to` refuses, or a
        pattern that matches nothing.

        >>> trace(torch.nn.Linear, 3, 4).cast(torch.bfloat16).materialize(seed=0).weight.dtype
        torch.bfloat16
        """
        return replace(self, _decided=self.decisions.cast(dtype, self.graph))

    def to(self, device: str | torch.device) -> Plan:
        """Put parameters and buffers on `device` (`cpu`, `cuda`, `cuda:N`): the same as `build().to(device)`.

        >>> trace(torch.nn.Linear, 3, 4).to("cpu").materialize(seed=0).weight.device
        device(type='cpu')
        """
        return replace(self, _decided=self.decisions.to(device))

    def shard(
        self,
        axes: Mapping[str, int],
        *,
        units: str | Sequence[str] = LAYERS,
        tensor: str | Mapping[str, str] | None = None,
        reshard: Reshard = True,
        compute_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        offload: bool = False,
        schedule: Schedule | None = None,
        microbatches: int | None = None,
        stages: int | Sequence[int] | Sequence[Sequence[str]] | None = None,
        experts: str | Sequence[str] | None = None,
        sequence_parallel: bool = False,
        loss_parallel: bool = False,
        workload: Workload | None = None,
    ) -> Plan:
        """Divide the module between the ranks of a mesh: `{"dp": 8}`, or `{"dp_replicate": 2, "dp_shard": 4, "tp": 2}`.

        No process group is needed before `materialize`, which carries it out with torch's FSDP2, tensor parallelism and
        replication. `dp`, `fsdp`, `dp_shard` or `shard` is the axis that FSDP shards along, `dp_replicate`, `replicate` or `ddp`
        the one that it replicates along, `tp` or `tensor` the one that single layers are divided along.

        FSDP gathers one of the `units` at a time: patterns of the names of modules (`*` stands within one component, `0-3` for
        numbers), or `"layers"`, every layer that repeats. `reshard` is FSDP2's `reshard_after_forward`, or one for each pattern
        of units, the first match first: `{"layers.0-3": False, "*": True}`, where `"*"` is all the rest and `""` the module as a
        whole. `compute_dtype` and `reduce_dtype` are its mixed precision, `offload` keeps shards in host memory. `tensor` gives a
        style for patterns of modules: `{"layers.*.up": "colwise", "layers.*.down": "rowwise"}` (`colwise`, `rowwise`,
        `colwise_gather_output`, `rowwise_split_input`, `embedding_rowwise`, `embedding_colwise`), or `"auto"`, a transformers
        model's own `tp_plan`.

        `"infer"` finds such rules in the module's own forward, run once on fake tensors: linear layers whose outputs reach one
        other linear layer through ops that work on each part by itself, be they elementwise or attention over heads, are divided
        by columns, and that one by rows; a vocabulary's embedding and head stand alone. What is found is divided by torch and run
        as one rank of many: where ops, shapes or gradients then differ, as in code that counts heads by a plain number, the layer
        stays whole. The forward gets the inputs of `workload`, else a few made as for `memory`.

        Pipeline, context and expert axes (`pp`, `cp`, `ep`, as torchtitan has them), `sequence_parallel` and `loss_parallel` are
        for `memory` and `report`: `materialize` raises, and `meta_module` is what your own code shards then. `memory` counts
        activations under all of them; along `ep` it takes tokens to be spread evenly over the experts. FSDP divides along
        `dp_shard` and `cp` as one axis. `ep` takes its ranks from `dp_shard`, `cp` and `tp`, so that it adds none: experts are
        divided along it, and by FSDP, as units by themselves, between the ranks that are left. `experts` are patterns of the
        parameters, modules or lists that hold them; None takes the model's own `ep_plan`, or finds them beside a router.

        Along `pp` layers are divided by count; `stages` says how many stages there are, how many layers each has, or what each
        holds (`[["embed", "layers.0"], ["layers.1", "head"]]`, torchtitan's `module_fqns_per_model_part`). `schedule` is `1f1b`,
        `gpipe` or `interleaved1f1b`; `microbatches` a rank's batch is divided into, as many as there are stages if None.

        Raises `DecisionError` for axes, units, rules, stages or experts that do not fit the module, quoting the values, and for
        `"infer"` where nothing can be divided, saying why of each kind of layer; `MemoryRunError` where forward looks at values.

        >>> plan = trace(torch.nn.Transformer, 16, 2, 2, 2, 32).shard({"dp": 4})
        >>> plan.decisions.sharding.units
        ('encoder.layers.*', 'decoder.layers.*')
        >>> mlp = lambda: torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
        >>> plan = trace(mlp).shard({"tp": 2}, tensor="infer")
        >>> {rule.pattern: rule.style for rule in plan.decisions.sharding.tensor}
        {'0': 'colwise', '2': 'rowwise'}
        >>> plan = trace(torch.nn.Sequential, *(torch.nn.Linear(4, 4) for _ in range(5))).shard({"pp": 2}, microbatches=8)
        >>> plan.decisions.sharding.pipeline.stages
        (('0', '1', '2'), ('3', '4'))
        """
        engine: Literal["torch", "transformers"] = "transformers" if tensor == "auto" else "torch"
        rules = self._found_rules(tensor, axes, workload) if isinstance(tensor, str) else tensor
        made = sharding(
            axes,
            self.graph,
            units,
            rules,
            engine,
            reshard,
            compute_dtype,
            reduce_dtype,
            offload,
            schedule=schedule,
            microbatches=microbatches,
            stages=stages,
            experts=self._own_experts(axes) if experts is None else [experts] if isinstance(experts, str) else experts,
            sequence_parallel=sequence_parallel,
            loss_parallel=loss_parallel,
        )
        return replace(self, _decided=self.decisions.shard(made))

    def checkpoint_activations(self, levels: Mapping[str, Checkpointing]) -> Plan:
        """Have modules run again in the backward instead of keeping what they computed: `{"layers.0-11": "full"}`.

        A pattern matches the names of modules component by component, `*` within one, `0-11` for numbers; the first match wins.
        `"full"` keeps a module's inputs alone, `"selective"` besides what attention, reduce-scatter and every other matrix
        product give (torchtitan's policy), `"none"` nothing else than without. What `materialize` and `gp.materialize` build does
        it by itself, with `torch.utils.checkpoint`: names, values, losses and random numbers are those of the module without, and
        so are gradients, but for rounding where autograd adds several up. Every tier of `memory`, and `verify`, go by it. A
        transformers model makes no cache of keys and values while it trains then. A second call takes the place of the first.

        Raises `DecisionError` for a pattern that decides about no module with parameters, for modules inside each other, for
        those that are never called (`ModuleList`), beside `place` and `quantize`; and, where memory is asked for,
        `gp.Training(checkpointing=...)` beside it.

        >>> layers = [torch.nn.Linear(8, 8) for _ in range(3)]
        >>> plan = trace(lambda: torch.nn.Sequential(*layers)).checkpoint_activations({"0-1": "full"})
        >>> [(rule.pattern, rule.level) for rule in plan.decisions.checkpointing]
        [('0-1', 'full')]
        """
        return replace(self, _decided=self.decisions.checkpoint_activations(checkpoint_rules(levels, self.graph)))

    def place(self, devices: Mapping[str, str | torch.device]) -> Plan:
        """Put each tensor on the device of the first pattern that matches: several devices, or the disk, in one process.

        `{"layers.0-15": "cuda:0", "layers.*": "cpu", "*": "disk"}`: a pattern names tensors or what holds them, `*` as in
        `fnmatch`, `0-15` numbers. `materialize` fills every tensor where it goes and has accelerate's `dispatch_model` prepare
        the module for inference; what is on disk is written to `materialize(offload_dir=...)` tensor by tensor.

        Raises `DecisionError` for a pattern that matches nothing, a tensor that none matches, and where the names of a tied
        tensor lead to two devices.

        >>> plan = trace(torch.nn.Linear, 3, 4).place({"bias": "cpu", "*": "cpu"})
        """
        return replace(self, _decided=self.decisions.place(placing(devices, self.graph)))

    def quantize(self, config: Any, *, filter: Filter = None) -> Plan:
        """Quantize linear layers while building, each as soon as it is filled: the same as `torchao.quantization.quantize_`.

        `config` is any torchao config (`Int8WeightOnlyConfig()`, ...), `filter` says which layers: a pattern of their names or
        several (`*` as in `fnmatch`; the plain name of a module picks it whatever it is), or a function of (module, name) as
        `quantize_` takes, asked now; None is torchao's default, every `nn.Linear`. What is built equals
        `quantize_(model, config, filter)` on the eager model after the plan's casts, and takes the quantized bytes and about one
        layer. What torchao leaves alone stays as it is: Int4WeightOnlyConfig, where its group size does not divide a row.

        `"bnb.nf4"`, `"bnb.nf4-dq"`, `"bnb.fp4"`, `"bnb.fp4-dq"` and `"bnb.int8"` put layers of bitsandbytes in their places
        instead, quantized from the plan's dtype; what they compute in is bitsandbytes' choice, by their input.

        Several calls quantize layers of their own each; `cast` and `to` come before. Raises `DecisionError` for a pattern that
        matches nothing, a config that cannot be saved, beside `shard` and `place`, and where torchao or bitsandbytes is missing.

        >>> from torchao.quantization import Int8WeightOnlyConfig
        >>> plan = trace(torch.nn.Linear, 3, 4).quantize(Int8WeightOnlyConfig())
        >>> plan.materialize(seed=0).weight.dequantize().shape
        torch.Size([4, 3])
        """
        from .runtime.quantize import quantizing

        return replace(self, _decided=self.decisions.quantize(quantizing(self._bound, self.decisions, config, filter)))

    def fit(
        self,
        cluster: Cluster | str,
        workload: Training | Inference,
        *,
        disk: bool = False,
        together: Sequence[str] | None = None,
        axes: Mapping[str, int] | None = None,
        tensor: str | Mapping[str, str] | None = "auto",
        offload: bool | None = None,
        checkpointing: Checkpointing | Sequence[Checkpointing] | None = None,
        dtype: Dtypes = None,
        compute_dtype: Dtypes = None,
        reduce_dtype: Dtypes = None,
        split_batch: bool = False,
        reserve: int = 0,
        margin: float | None = None,
        time_limit: float | None = None,
        tier: Tier = "T1",
        speeds: Speeds | None = None,
    ) -> Plan:
        """Decide what makes the model fit a cluster, a `gp.Cluster` or a string such as `"8xH100-80GB"`, and be fast there.

        **Training** (`gp.Training`): of all meshes of the cluster's ranks over replicate, shard and tensor axes the one with
        which a sample takes the least time, with the layers that are checkpointed, and those whose parameters stay gathered
        between forward and backward, chosen by a mixed-integer program under the bytes that each rank has. Time is predicted as
        by `step_time`, memory as by `memory`; what is found is run on fake tensors (tier T1), and the search repeated with less
        room where that takes more. `materialize` carries the plan out, and `explain` says why it is as it is.

        The rest is for what you want to decide yourself. `axes` gives sizes of axes: `{"tp": 8}`. `tensor` is as in `shard`, None
        forbids a tensor axis; `"auto"` is a transformers model's own plan, or else one that is inferred. `offload` True or False
        forces or forbids that shards and optimizer state live in host memory; None takes it where nothing fits otherwise and the
        cluster says how much host memory there is. `checkpointing` is the levels that are allowed, all three if None, as is
        `Training(checkpointing=...)` unless it is `"none"`. `dtype` is what weights may be cast to, `compute_dtype` and
        `reduce_dtype` are FSDP2's mixed precision: one of them, or several to choose from. With `split_batch` the batch may be
        split into micro-batches. `reserve` bytes stay free on each device, besides the `margin`, a share of what is needed (0.2;
        if nothing fits with it, 0 and "tight"). `time_limit` is in seconds: the best found by then. `tier="T0"` leaves out the
        run. `speeds` are measured ones (`gp.measure_speeds()`).

        **Serving** (`gp.Inference`) on one node: one device has all of it, if one can; else each gets consecutive layers, and
        what is left lies in host memory, or on disk if `disk` allows that: the fewest bytes for the room that there is, by an
        exact search, with the cache and activations of `workload` counted. What is found is checked by the verdict, CUDA context,
        allocator's rules and margin included; a place that falls short gets less room, and the search is repeated. `together` are
        patterns of modules that are not divided, every layer that repeats if None.

        Raises `FitError` where nothing fits, with what is missing and what would do, each tried. Raises `DecisionError` for
        options that cannot be, serving on several nodes, and plans that have decided.

        >>> plan = trace(lambda: torch.nn.Sequential(*(torch.nn.Linear(8192, 8192) for _ in range(40))))
        >>> plan.fit("1x24GB", Inference(batch_size=1)).decisions.steps
        (Move(kind='move', device='cuda:0'),)
        >>> plan.fit("1x8GB+64GB-cpu", Inference(batch_size=1)).decisions.placing.main
        'cuda:0'
        >>> trained = plan.fit("4x24GB", Training("sgd", inputs=(torch.ones(64, 8192),)), tensor=None)
        >>> trained.decisions.sharding.describe()
        'dp_shard=4'
        """
        from .fitting import fit

        return fit(
            self,
            cluster_of(cluster),
            workload,
            {"disk": disk, "together": together},
            {
                "axes": axes,
                "tensor": tensor,
                "offload": offload,
                "checkpointing": checkpointing,
                "dtype": dtype,
                "compute_dtype": compute_dtype,
                "reduce_dtype": reduce_dtype,
                "split_batch": split_batch,
                "reserve": reserve,
                "margin": margin,
                "time_limit": time_limit,
                "tier": tier,
                "speeds": speeds,
            },
        )

    def _found_rules(self, tensor: str, axes: Mapping[str, int], workload: Workload | None) -> Mapping[str, str]:
        """The rules that are not the user's: the model's own, or those that a traced forward shows."""
        if tensor == "auto":
            return self._own_rules()
        if tensor != "infer":
            raise DecisionError(f'tensor={tensor!r} is neither "auto" nor "infer" nor a mapping of patterns to styles')
        from .runtime.tensor_rules import inferred_rules

        check_axes(axes)
        ranks = next((size for name, size in axes.items() if ROLES[name] == "tensor"), None)
        if ranks is None:
            raise DecisionError(f'tensor="infer" is for a tensor axis, and {", ".join(axes)} is none; add "tp" to the axes')
        return inferred_rules(self._bound, self.decisions, ranks, workload)

    def _left_whole(self) -> Sequence[str]:
        """What inferred rules of tensor parallelism leave out, and why, where they were found in this process."""
        if self.decisions.sharding is None or not self.decisions.sharding.tensor:
            return ()
        from .runtime.tensor_rules import left_whole

        return left_whole(self._bound, self.decisions)

    def _own_rules(self) -> Mapping[str, str]:
        """The tensor parallel plan that a transformers model brings along."""
        rules = getattr(self.meta_module(), "tp_plan", None)
        if not rules:
            raise DecisionError(
                f'{self.decisions.constructor} has no tensor parallel plan of its own (tp_plan), which tensor="auto" means; say '
                'tensor="infer", or give one, such as tensor={"layers.*.up": "colwise", "layers.*.down": "rowwise"}'
            )
        return dict(rules)

    def _own_experts(self, axes: Mapping[str, int]) -> Sequence[str] | None:
        """What the expert parallel plan that a transformers model brings along divides; None where there is none, or no need."""
        if not isinstance(axes, Mapping) or not any(ROLES.get(name) == "expert" for name in axes):
            return None
        own = getattr(self.meta_module(), "ep_plan", None)
        divided = [pattern for pattern, style in own.items() if style == "grouped_gemm"] if isinstance(own, dict) else []
        names = [name for tensor in self.graph.parameters for name in tensor.names]
        return [pattern for pattern in divided if any(matches(pattern, name) for name in names)] or None

    # -- keeping --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the decisions to `path` as JSON: data, never code. `Plan.load(path).bind(build, ...)` is the way back.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trace(torch.nn.Linear, 3, 4).save(f"{folder}/plan.json")
        ...     print(Plan.load(f"{folder}/plan.json").bind(torch.nn.Linear, 3, 4).graph.tensor("bias").shape)
        (4,)
        """
        save_decisions(self.decisions, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read the decisions that `save` wrote. Nothing in the file is executed; raises `PlanFileError` for anything else."""
        return Plan(load_decisions(path))

    def bind(self, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
        """Trace `build(*args, **kwargs)` and join it with these decisions.

        Raises `PlanFileError` where it is not the constructor, or not the arguments, that the decisions were taken for.
        """
        built = Build.trace(build, args, kwargs)
        check_decisions(self.decisions, built.graph)
        if self.decisions.bound_state != built.bound_state:
            raise PlanFileError(
                f"the constructor {self.decisions.constructor} looks at random values, so the plan holds for one generator state "
                f"only, {self.decisions.bound_state}; it is now {built.bound_state}: set the same seed, or trace anew"
            )
        return Plan(self.decisions, built)

    # -- building -------------------------------------------------------------------------------------------------------

    def meta_module(self) -> Any:
        """A fresh module of ordinary *meta* tensors, with the plan's casts done, ready for your own `fully_shard` and the like.

        Each of its submodules remembers the plan, so that `gp.materialize(module)` can give it its values afterwards. The
        constructor runs once more, under trace.

        >>> module = trace(torch.nn.Linear, 3, 4).meta_module()
        >>> module.weight.device
        device(type='meta')
        """
        return meta_module(self._bound, self.decisions)

    def materialize(
        self,
        seed: int | None = None,
        checkpoint: Source | None = None,
        *,
        rng: str = "eager",
        uninitialized: str = "error",
        missing: str = "init",
        unexpected: str = "error",
        rename: Rename | None = None,
        threads: int | None = None,
        progress: bool | ProgressCallback = True,
        mesh: DeviceMesh | None = None,
        timeout: float | None = None,
        offload_dir: str | os.PathLike[str] | None = None,
    ) -> Any:
        r"""Build the module, with the values that the eager constructor gives, bit for bit; any number of times.

        `plan.materialize(seed=s)` is `torch.manual_seed(s); build(*args, **kwargs)` followed by the plan's casts and moves. The
        constructor runs again, for real. `seed=None` draws from, and advances, the global generator. `rng="keyed"` gives other
        values, which depend on the seed and each tensor's name alone. `threads` draw the random numbers, one for each usable core
        if that is None; the values do not depend on how many. `progress` shows a bar in a
        terminal, or is called with (bytes done, bytes in all), unless the plan shards, places or quantizes. Where the
        constructor leaves tensors without values,
        `UninitializedError` is raised, unless `uninitialized` says `"zero"` or `"empty"`. On any failure nothing half-built
        stays behind, and the generators stand where they stood.

        `checkpoint` is a safetensors file, the index of several, a file of `torch.save`, a folder of
        `torch.distributed.checkpoint` or of a model from the Hugging Face hub, or a state dict. What it has is read, not drawn:
        each tensor once, only the part that is needed, straight into its final memory and dtype; nothing in it is executed. What
        it does not have gets the value that the constructor gives it, and is listed by the logger `groundplan`, or is an error
        with `missing="error"`. Names that the module does not have are an error unless `unexpected="ignore"`. `rename` gives
        names their place in the module: regular expressions and their replacements, `{r"^model\.": ""}`, or a function; None
        leaves a tensor out. The generators are left alone where nothing is drawn.

        A plan that shards is built by all ranks together: each makes the same call, and fills its own part only. They form the
        plan's mesh, or are that of `mesh`, whose axes have the plan's names and sizes; `timeout` is as in `gp.materialize`.
        `offload_dir` is a new folder for what a plan places on disk.

        >>> model = trace(torch.nn.Linear, 3, 4).materialize(seed=0)
        >>> _ = torch.manual_seed(0)
        >>> torch.equal(model.weight, torch.nn.Linear(3, 4).weight)
        True
        """
        options = Options.of(seed, checkpoint, rng, uninitialized, missing, unexpected, rename, threads)
        if self.decisions.sharding is not None:
            from .runtime.inplace import materialize_sharded

            return materialize_sharded(self._bound, self.decisions, options, mesh, timeout)
        if mesh is not None:
            raise MaterializeError("mesh= is given, and the plan does not shard; say plan.shard({axis: size, ...}) first")
        if self.decisions.placing is not None:
            from .runtime.dispatch import materialize_placed

            return materialize_placed(self._bound, self.decisions, options, offload_dir)
        if self.decisions.quantizing:
            from .runtime.quantize import materialize_quantized

            return materialize_quantized(self._bound, self.decisions, options)
        with shown(progress, self.memory().phases["construct"]) as callback:
            if options.load is not None:
                from .runtime.loaded import materialize_loaded

                return materialize_loaded(self._bound, self.decisions, options, callback)
            return materialize_plan(self._bound, self.decisions, seed, uninitialized, callback, threads, rng)

    def materialize_state(
        self,
        names: Iterable[str] | Mapping[str, Any],
        seed: int | None = None,
        *,
        rng: str = "eager",
        uninitialized: str = "error",
        threads: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors called `names` only, with the values that `materialize(seed)` gives them, each from its own recipe.

        A mapping gives an index for each name, and only that part of the tensor is made: `{"head.weight": slice(0, 100)}` or
        `(slice(None), 3)` mean what they do in `tensor[index]`. `rng` and `threads` are as in `materialize`. The global
        generators are left alone. Raises `UnknownNameError`, `UninitializedError`, and `MaterializeError` for what is no part of
        the tensor.

        >>> plan = trace(torch.nn.Linear, 3, 4)
        >>> bias = plan.materialize_state(["bias"], seed=0)["bias"]
        >>> torch.equal(bias, plan.materialize(seed=0).bias)
        True
        >>> plan.materialize_state({"weight": (slice(1, 3), 0)}, seed=0)["weight"].shape
        torch.Size([2])
        """
        return materialize_state(self._bound, self.decisions, names, seed, uninitialized, threads, rng)

    def save_checkpoint(
        self,
        source: int | torch.nn.Module | None,
        path: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        format: str = "safetensors",
        rng: str = "eager",
        uninitialized: str = "error",
        threads: int | None = None,
    ) -> None:
        """Write an initial checkpoint straight from the plan, tensor by tensor: the whole model is never in memory.

        `source` is a seed, or None for the generators as they are (they are left alone either way): the values are those of
        `materialize(seed)`, casts done. Or it is a module, sharded ones included (all ranks call), whose state is written.

        `path` ends in `.safetensors` for one file; else it is a folder, for files of at most `max_shard_size` (bytes, or `"5GB"`)
        with an index, as transformers writes them, or with `format="dcp"` for torch.distributed.checkpoint. Tied tensors are
        written once, under their first name. Nothing that is there is overwritten, and on failure nothing is left behind.

        Raises `CheckpointError`.

        >>> import tempfile
        >>> plan = trace(torch.nn.Linear, 3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan.save_checkpoint(0, f"{folder}/initial.safetensors")
        ...     loaded = plan.materialize(checkpoint=f"{folder}/initial.safetensors")
        >>> torch.equal(loaded.weight, plan.materialize(seed=0).weight)
        True
        """
        from .runtime.saving import save_checkpoint

        options = Options(None, rng, uninitialized, threads)
        save_checkpoint(self._bound, self.decisions, source, path, max_shard_size, format, options)

    def verify(
        self,
        workload: Training | None = None,
        *,
        steps: int = 3,
        seed: int | None = None,
        checkpoint: Source | None = None,
        saving: bool | None = None,
        keep: bool = False,
        mesh: DeviceMesh | None = None,
        timeout: float | None = None,
    ) -> Verification:
        """Build the plan for real, train it for `steps` steps, and say what every phase took beside what was predicted.

        The module is built as by `materialize(seed, checkpoint)` and, with a `workload`, takes its steps. On CUDA the peaks are
        the caching allocator's own counts, on the CPU those of torch.profiler's memory events. Two more steps are looked at op by
        op: they say which kinds of memory and which tensors the difference consists of. A checkpoint of the module is written to
        a temporary folder, and removed, where that is cheap (4 GB) or with `saving=True`. With `keep` the module, as the steps
        left it, is the verification's `module`; else it is dropped.

        Every rank of a sharded plan makes the same call and measures itself; all of them get all figures. Random generators are
        as they were afterwards; CUDA's peak counters and the process's own record of resident memory (VmHWM) start anew.

        Raises `DecisionError` for steps below 2 and for training a plan that places or quantizes; what `materialize` raises.

        >>> found = trace(torch.nn.Linear, 300, 400).verify(Training("sgd", batch_size=2, implementation="for-loop"))
        >>> found.check("step").difference
        0
        """
        from .verification import verified

        return verified(self, workload, steps, seed, checkpoint, saving, keep, mesh, timeout)

    def _time(self, workload: Workload | None, cluster: Cluster | str | None) -> StepTime | str | None:
        """How long a step takes, or why that is not known; None where nobody asks."""
        if cluster is None or not isinstance(workload, Training):
            return None
        try:
            return self.step_time(workload, cluster)
        except DecisionError as error:
            return str(error)

    def _workload_of(self, workload: Workload | None) -> Workload | None:
        """The one that is asked about, or else the one that the plan was fitted to."""
        if workload is not None or self._workload is not None:
            return workload or self._workload
        return None if self.decisions.fitted is None else workload_of(self.decisions.fitted)

    @property
    def _bound(self) -> Build:
        if self._build is None:
            raise PlanFileError(
                "this plan was loaded from a file and has no constructor yet; say plan.bind(build, *args, **kwargs) with the one "
                f"that it was traced from, {self.decisions.constructor}"
            )
        return self._build


def _name_of(build: Callable[..., Any]) -> str:
    """`package.module.Class`, for display."""
    owner = build if hasattr(build, "__qualname__") else getattr(build, "func", type(build))
    return f"{getattr(owner, '__module__', '?')}.{getattr(owner, '__qualname__', type(owner).__qualname__)}"
