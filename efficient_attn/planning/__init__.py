"""What a model needs before it is built: memory, the longest sequence, time, and which mechanism to take.

Sizes are integers in bytes (GiB is 2^30, GB is 10^9), times are in seconds, FLOPs count 2 for each multiply-accumulate.
"""

from .calibration import calibrate, load_device, save_device
from .communication import sent_bytes
from .costs import MemoryNeeds, ModelCost, model_cost
from .crossovers import METRICS, Crossover, crossover
from .devices import DEVICES, Device
from .lengths import LengthLimit, max_seq_len
from .models import MODELS, MechanismSpec, Model, Recurrent
from .recommending import Candidate, Plan, Rejection, Workload, recommend
from .shares import LayerShares, PathLength, layer_shares, path_length
from .times import TimeEstimate, estimate_time

__all__ = [
    "DEVICES",
    "METRICS",
    "MODELS",
    "Candidate",
    "Crossover",
    "Device",
    "LayerShares",
    "LengthLimit",
    "MechanismSpec",
    "MemoryNeeds",
    "Model",
    "ModelCost",
    "PathLength",
    "Plan",
    "Recurrent",
    "Rejection",
    "TimeEstimate",
    "Workload",
    "calibrate",
    "crossover",
    "estimate_time",
    "layer_shares",
    "load_device",
    "max_seq_len",
    "model_cost",
    "path_length",
    "recommend",
    "save_device",
    "sent_bytes",
]
