"""groundplan draws a PyTorch model's ground plan before anything is built, then builds exactly that.

Three stages, each a folder with one verb and one noun:

    constructor --tracer--> ParamGraph --planner--> Plan --runtime--> nn.Module on its devices
                            what there is            what to do        done

One tiny module through all of them:

>>> import torch, groundplan as gp
>>> plan = gp.trace(torch.nn.Linear, 3, 4)             # runs the constructor, allocates nothing
>>> for tensor in plan.graph.parameters:               # what there is
...     print(tensor.name, tensor.shape, [op.describe() for op in plan.graph.recipe(tensor.name)])
weight (4, 3) ['kaiming_uniform_(a=2.236)']
bias (4,) ['uniform_(a=-0.5774, b=0.5774)']
>>> plan = plan.cast(torch.bfloat16)                   # what to do
>>> plan.memory().phases
{'construct': 88, 'load': 32, 'checkpoint': 32}
>>> model = plan.materialize(seed=0)                   # done
>>> _ = torch.manual_seed(0)
>>> torch.equal(model.weight, torch.nn.Linear(3, 4).to(torch.bfloat16).weight)
True
"""

from . import lightning
from .explain import Explanation
from .in_place import deepspeed_zero3, materialize, param_init_fn
from .plan import Plan, trace
from .planner.calibration import Calibration
from .planner.cluster import Cluster
from .planner.decisions import Decisions, groundplan_version
from .planner.inference import Inference
from .planner.memory import Memory
from .planner.speeds import Speeds
from .planner.step_time import StepTime
from .planner.verdict import Verdict
from .planner.workload import Training
from .report import Report
from .timing import measure_speeds
from .tracer.errors import (
    CalibrationError,
    CheckpointError,
    DecisionError,
    FitError,
    GraphError,
    GroundplanError,
    MaterializeError,
    MemoryRunError,
    PlanFileError,
    RanksError,
    SpecError,
    TraceError,
    UninitializedError,
    UnknownNameError,
)
from .tracer.graph import ParamGraph
from .verification import Verification

__version__ = groundplan_version()

__all__ = [
    "trace",
    "materialize",
    "lightning",
    "param_init_fn",
    "deepspeed_zero3",
    "measure_speeds",
    "Plan",
    "ParamGraph",
    "Decisions",
    "Training",
    "Inference",
    "Cluster",
    "Memory",
    "Verdict",
    "Verification",
    "Calibration",
    "StepTime",
    "Speeds",
    "Report",
    "Explanation",
    "GroundplanError",
    "TraceError",
    "GraphError",
    "UnknownNameError",
    "DecisionError",
    "PlanFileError",
    "MaterializeError",
    "UninitializedError",
    "RanksError",
    "CheckpointError",
    "FitError",
    "MemoryRunError",
    "CalibrationError",
    "SpecError",
]
