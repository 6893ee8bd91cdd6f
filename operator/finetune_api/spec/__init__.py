"""FineTuneJobSpec: what a user asks for. The docstrings are the reference documentation and the CRD's descriptions."""

from .common import SecretReference
from .data import Dataset, DatasetChecks, DatasetFormat, DatasetSource
from .evaluation import ANSWER_METRICS, Evaluation, Forgetting, Gate, Metric, Output
from .job import FORMATS_OF, UNSHARDED_METHODS, UNSHARDED_OBJECTIVES, FineTuneJobSpec
from .model import Endpoint, Model
from .run import Checkpoint, ComputeResources, FailureAction, FailureCause, FailurePolicy, RunPolicy, WorkspaceTemplate
from .tuning import (
    LORA_METHODS,
    PREFERENCE_OBJECTIVES,
    VIRTUAL_TOKEN_METHODS,
    WHOLE_MODEL_METHODS,
    Distillation,
    Grpo,
    Hyperparameters,
    Lora,
    Method,
    Objective,
    Partial,
    Preference,
    Reward,
    Tracking,
    Tuning,
    VirtualTokens,
)

__all__ = [
    "ANSWER_METRICS",
    "FORMATS_OF",
    "LORA_METHODS",
    "PREFERENCE_OBJECTIVES",
    "UNSHARDED_METHODS",
    "UNSHARDED_OBJECTIVES",
    "VIRTUAL_TOKEN_METHODS",
    "WHOLE_MODEL_METHODS",
    "Checkpoint",
    "ComputeResources",
    "Dataset",
    "DatasetChecks",
    "DatasetFormat",
    "DatasetSource",
    "Distillation",
    "Endpoint",
    "Evaluation",
    "FailureAction",
    "FailureCause",
    "FailurePolicy",
    "FineTuneJobSpec",
    "Forgetting",
    "Gate",
    "Grpo",
    "Hyperparameters",
    "Lora",
    "Method",
    "Metric",
    "Model",
    "Objective",
    "Output",
    "Partial",
    "Preference",
    "Reward",
    "RunPolicy",
    "SecretReference",
    "Tracking",
    "Tuning",
    "VirtualTokens",
    "WorkspaceTemplate",
]
