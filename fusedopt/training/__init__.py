"""What happens around an optimizer: recipes and presets, their validation, the memory that they take, and advice.

```python
from fusedopt import training

recipe = training.preset("text-classification").replaced(lr=3e-5)
print(training.validate(recipe, steps=10_000))
optimizer, scheduler = recipe.build(model, total_steps=10_000)
```
"""

from .changes import ABSENT, Change, Diff
from .estimate import Estimate, estimate
from .findings import Finding, Findings
from .presets import Preset, find_preset, preset, presets
from .recipe import Recipe
from .recommend import Recommendation, recommend
from .validate import validate

__all__ = [
    "ABSENT",
    "Change",
    "Diff",
    "Estimate",
    "Finding",
    "Findings",
    "Preset",
    "Recipe",
    "Recommendation",
    "estimate",
    "find_preset",
    "preset",
    "presets",
    "recommend",
    "validate",
]
