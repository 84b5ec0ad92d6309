"""What happens around an optimizer: recipes and presets, their validation, the memory that they take, and advice.

```python
from fusedopt import training

recipe = training.preset("text-classification").replaced(lr=3e-5)
print(training.validate(recipe, steps=10_000))
optimizer, scheduler = recipe.build(model, total_steps=10_000)
```
"""

from .anomalies import Anomaly, Detector, Limits
from .changes import ABSENT, Change, Diff
from .diagnose import Diagnosis, Remedy, diagnose
from .diagnose_profile import Profile, profile_steps
from .estimate import Estimate, estimate
from .findings import Finding, Findings
from .monitor import Monitor, StopTraining, TrainingWarning
from .monitor_runs import Run, read_run
from .presets import Preset, find_preset, preset, presets
from .recipe import Recipe
from .recommend import Recommendation, recommend
from .validate import validate

__all__ = [
    "ABSENT",
    "Anomaly",
    "Change",
    "Detector",
    "Diagnosis",
    "Diff",
    "Estimate",
    "Finding",
    "Findings",
    "Limits",
    "Monitor",
    "Preset",
    "Profile",
    "Recipe",
    "Recommendation",
    "Remedy",
    "Run",
    "StopTraining",
    "TrainingWarning",
    "diagnose",
    "estimate",
    "find_preset",
    "preset",
    "presets",
    "profile_steps",
    "read_run",
    "recommend",
    "validate",
]
