"""Packages that are not installed: importing works without any, and what needs one says what to install."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# What is asked of the package, and which package it then needs.
CASES = {
    "fusedopt.schedules.Linear(0, 10).plot()": "matplotlib",
    "scheduler = torch.optim.SGD([torch.zeros(1)]); "
    "fusedopt.get_scheduler('greedy', scheduler).trainer_callback()": "transformers",
    "from fusedopt.integrations.transformers import enable; enable()": "transformers",
    "from fusedopt.integrations.transformers import names; names()": "transformers",
    "from fusedopt.integrations.transformers import FusedTrainer": "transformers",
    "from fusedopt.integrations.transformers import FusedCallback": "transformers",
    "from fusedopt.integrations.lightning import FusedCallback": "lightning",
    "from fusedopt.integrations.timm import register; register()": "timm",
    "from fusedopt.integrations.torchtitan import config; config('adamw')": "torchtitan",
    "training.Recipe(lr=1e-3)": "pydantic",
    "training.preset('lora')": "ruamel.yaml",
    "training.Recipe.from_text('lr = 1', 'toml')": "tomlkit",
    "training.load_search('.')": "optuna",
    "from fusedopt.training import pictures; pictures.axes()": "matplotlib",
    "from fusedopt.training import monitor_pictures, monitor_runs; "
    "monitor_pictures.svg(monitor_runs.Run())": "matplotlib",
}
_SCRIPT = """
import json, sys

missing = json.loads(sys.argv[1])

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in missing):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
import torch
import fusedopt
from fusedopt import training

said = {}
for code in json.loads(sys.argv[2]):
    try:
        exec(code)
    except Exception as error:
        said[code] = [type(error).__name__, str(error)]
parameter = torch.nn.Parameter(torch.ones(64, 64))
parameter.grad = torch.ones(64, 64)
fusedopt.AdamW([parameter], state_dtype="8bit", max_grad_norm=1.0).step()
said["unexpected"] = [name for name in missing if name in sys.modules]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> Any:
    more = ["rich", "typer", "triton", "accelerate", "pytorch_lightning", "optuna", "bitsandbytes", "torchao"]
    arguments = [json.dumps([*set(CASES.values()), *more]), json.dumps([*CASES])]
    done = subprocess.run([sys.executable, "-c", _SCRIPT, *arguments], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("code", "package"), CASES.items())
def test_what_is_missing_is_named_with_what_to_install(code: str, package: str, said: Any) -> None:
    kind, text = said[code]
    assert kind == "ImportError", text
    assert f" needs {package}; install it with: pip install " in text


def test_optimizers_need_none_of_them(said: Any) -> None:
    assert said["unexpected"] == []
