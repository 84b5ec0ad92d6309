"""fusedopt: compiled-kernel optimizers for PyTorch.

import fusedopt
optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4, state_dtype="8bit", max_grad_norm=1.0)
"""

from . import schedules
from .adafactor import Adafactor, AdafactorSchedule, recommended_adafactor
from .adagrad import Adagrad
from .adamw import Adam, AdamW
from .ademamix import AdEMAMix
from .anyprecision import AnyPrecisionAdamW
from .convert import (
    from_bitsandbytes,
    from_torchao,
    to_bitsandbytes,
    to_torch_state_dict,
    to_torchao,
)
from .groups import param_groups
from .lion import Lion
from .names import create_optimizer, optimizer_names
from .optimizer import FusedOptimizer
from .rmsprop import RMSprop
from .schedules import get_scheduler
from .sgd import SGD
from .weights import fp32_parameters, load_fp32_parameters

__version__ = "0.2.0.dev0"
__all__ = [
    "SGD",
    "AdEMAMix",
    "Adafactor",
    "AdafactorSchedule",
    "Adagrad",
    "Adam",
    "AdamW",
    "AnyPrecisionAdamW",
    "FusedOptimizer",
    "Lion",
    "RMSprop",
    "__version__",
    "create_optimizer",
    "fp32_parameters",
    "from_bitsandbytes",
    "from_torchao",
    "get_scheduler",
    "load_fp32_parameters",
    "optimizer_names",
    "param_groups",
    "recommended_adafactor",
    "schedules",
    "to_bitsandbytes",
    "to_torch_state_dict",
    "to_torchao",
]
