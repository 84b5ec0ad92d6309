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
from .compare import compare, load_comparison
from .comparison import Comparison, Trial
from .diagnose import Diagnosis, Remedy, diagnose
from .diagnose_profile import Profile, profile_steps
from .estimate import Estimate, estimate
from .evaluate import Evaluation, Evaluator, Metric
from .findings import Finding, Findings
from .intervals import Interval
from .loops import Outcome, Progress, run
from .monitor import Monitor, StopTraining, TrainingWarning
from .monitor_runs import Run, read_run
from .presets import Preset, find_preset, preset, presets
from .range_test import RangeTest, range_test
from .recipe import Recipe
from .recommend import Recommendation, recommend
from .report import report
from .report_pages import Report
from .search import load_search, read_search, search
from .search_result import Search, SearchTrial
from .search_space import Choice, Range, Space
from .validate import validate

__all__ = [
    "ABSENT",
    "Anomaly",
    "Change",
    "Choice",
    "Comparison",
    "Detector",
    "Diagnosis",
    "Diff",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Finding",
    "Findings",
    "Interval",
    "Limits",
    "Metric",
    "Monitor",
    "Outcome",
    "Preset",
    "Profile",
    "Progress",
    "Range",
    "RangeTest",
    "Recipe",
    "Recommendation",
    "Remedy",
    "Report",
    "Run",
    "Search",
    "SearchTrial",
    "Space",
    "StopTraining",
    "TrainingWarning",
    "Trial",
    "compare",
    "diagnose",
    "estimate",
    "find_preset",
    "load_comparison",
    "load_search",
    "preset",
    "presets",
    "profile_steps",
    "range_test",
    "read_run",
    "read_search",
    "recommend",
    "report",
    "run",
    "search",
    "validate",
]
