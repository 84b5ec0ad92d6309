"""Learning rate schedules: pure values that compose, schedulers for torch, and rules driven by measurements.

```python
from fusedopt import get_scheduler
from fusedopt.schedules import constant, decay, warmup

schedule = warmup(200) >> constant() >> decay("1-sqrt", 0.2)
scheduler = get_scheduler(schedule, optimizer, num_training_steps=10_000)
```
"""

from .compose import Constant, Decay, Product, Sequence, Warmup, constant, decay, warmup
from .feedback import Feedback, Greedy, Guided, Plateau, mode_of_metric
from .gradients import GradientNorm, GradientSparsity, gradient_sparsity
from .measured import GradientLR, MetricLR
from .named import (
    ConstantWithWarmup,
    Cosine,
    CosineWarmupWithMinLR,
    CosineWithMinLR,
    CosineWithRestarts,
    InverseSqrt,
    Linear,
    Polynomial,
    WarmupStableDecay,
)
from .names import get_scheduler, scheduler_names
from .schedule import Schedule, create_schedule, schedule_names
from .scheduler import ScheduleLR

__all__ = [
    "Constant",
    "ConstantWithWarmup",
    "Cosine",
    "CosineWarmupWithMinLR",
    "CosineWithMinLR",
    "CosineWithRestarts",
    "Decay",
    "Feedback",
    "GradientLR",
    "GradientNorm",
    "GradientSparsity",
    "Greedy",
    "Guided",
    "InverseSqrt",
    "Linear",
    "MetricLR",
    "Plateau",
    "Polynomial",
    "Product",
    "Schedule",
    "ScheduleLR",
    "Sequence",
    "Warmup",
    "WarmupStableDecay",
    "constant",
    "create_schedule",
    "decay",
    "get_scheduler",
    "gradient_sparsity",
    "mode_of_metric",
    "schedule_names",
    "scheduler_names",
    "warmup",
]
