"""fusedopt: compiled-kernel optimizers for PyTorch.

```python
import fusedopt

optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4, state_dtype="8bit", max_grad_norm=1.0)
```
"""

from importlib.util import find_spec as _find_spec

if _find_spec("fusedopt._core") is None:
    raise ImportError(
        f"{__path__[0]} holds fusedopt's sources without their compiled core; install them with `pip install -e .` in "
        "the folder above it, or start Python elsewhere to import the fusedopt that is installed"
    )

from . import schedules
from ._version import __version__
from .engine.fp32 import fp32_parameters, load_fp32_parameters
from .engine.optimizer import FusedOptimizer
from .groups import param_groups
from .interop import from_bitsandbytes, from_torchao, to_bitsandbytes, to_torch_state_dict, to_torchao
from .offload.release import release_gradients
from .optimizers import *  # noqa: F403  # exports are listed once, in optimizers/__init__.py
from .optimizers import __all__ as _optimizers
from .schedules import get_scheduler

__all__ = [
    "FusedOptimizer",
    "__version__",
    "fp32_parameters",
    "from_bitsandbytes",
    "from_torchao",
    "get_scheduler",
    "load_fp32_parameters",
    "param_groups",
    "release_gradients",
    "schedules",
    "to_bitsandbytes",
    "to_torch_state_dict",
    "to_torchao",
]
__all__ += _optimizers
