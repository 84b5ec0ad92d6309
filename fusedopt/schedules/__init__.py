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
from .functions import (
    get_adafactor_schedule,
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    get_greedy_schedule,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_reduce_on_plateau_schedule,
    get_wsd_schedule,
)
from .gradients import GradientNorm, GradientSparsity, gradient_sparsity
from .greedy import GreedyLR
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
    "GreedyLR",
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
    "get_adafactor_schedule",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_greedy_schedule",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_reduce_on_plateau_schedule",
    "get_scheduler",
    "get_wsd_schedule",
    "gradient_sparsity",
    "mode_of_metric",
    "schedule_names",
    "scheduler_names",
    "warmup",
]
