"""The names of transformers' optimizers: what each of them is here, and what Trainer gives it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from trainers import LR, arguments

# Releases of it need newer releases of torch than we do, and say so when what they import lazily is asked for.
pytest.importorskip("transformers.trainer_callback", exc_type=Exception)

import fusedopt
from fusedopt.integrations import transformers as ours
from fusedopt.optimizers.names import class_of, implied, released

ROOT = Path(__file__).resolve().parents[2]
transformers = peer("transformers")
peer("accelerate")

NAMES = [name for name, refusal in ours.names().items() if refusal is None]


def test_every_name_of_transformers_is_served_or_refused_in_a_sentence() -> None:
    """Fails when a name appears in transformers that names.py does not know."""
    for name, refusal in ours.names().items():
        if refusal is None:
            assert name in fusedopt.optimizer_names()
        else:
            assert re.fullmatch(rf"optimizer name '{name}' \w.*; .*use .*", refusal), name
            assert "is not known" not in refusal
            with pytest.raises(ValueError, match=re.escape(refusal)):
                fusedopt.create_optimizer(name, [torch.nn.Parameter(torch.ones(3))])


def row(name: str, refusal: str | None) -> str:
    """What the page says of a name."""
    if refusal is not None:
        return "refused: " + refusal.removeprefix(f"optimizer name {name!r} ")
    cls = class_of(name)
    given = ", ".join(f"{key}={value!r}" for key, value in implied(name, {"lr": LR}).items())
    note = f"; {cls.NOTES[name]}" if name in cls.NOTES else ""
    note = "; it steps during the backward pass" if released(name) else note
    return f"`{cls.__name__}`" + (f" with `{given}`" if given else "") + note


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs/frameworks/transformers.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE) == [
        (name, row(name, refusal)) for name, refusal in ours.names().items()
    ]


THEIR_STATE = {"optim_bits", "is_paged", "block_size", "bf16_stochastic_round", "model"}


def given_by_trainer(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    args = arguments(folder, optim=name, **changes)
    try:
        return transformers.Trainer.get_optimizer_cls_and_kwargs(args)[1]
    except (ImportError, ValueError) as error:
        pytest.skip(f"{name} needs a package: {error}")


@pytest.mark.filterwarnings("ignore:adamw_torch_4bit")
@pytest.mark.parametrize("name", [name for name in NAMES if not released(name)])
def test_names_mean_what_trainer_gives_them(name: str, tmp_path: Path) -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    theirs = given_by_trainer(name, tmp_path)
    theirs.pop("weight_decay", None)  # of the training, which is no default
    optimizer = fusedopt.create_optimizer(name, params, lr=theirs.pop("lr"))
    theirs = {key: value for key, value in theirs.items() if key not in THEIR_STATE}
    # With arguments of the training that are not the defaults, too.
    changed = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    args = arguments(tmp_path, optim=name, **changed)
    cls, kwargs = ours.optimizer(args)
    assert cls is type(optimizer)
    again = cls(params, **kwargs).defaults
    for found, expected in ((optimizer.defaults, theirs), (again, given_by_trainer(name, tmp_path, **changed))):
        for key, value in expected.items():
            if key in THEIR_STATE:
                continue
            if key.endswith("_dtype"):  # AnyPrecisionAdamW's, which become other settings
                value = str(value).removeprefix("torch.")
                names = {"momentum_dtype": ("state_dtype", "exp_avg"), "variance_dtype": ("state_dtype", "exp_avg_sq")}
                first, *rest = names.get(key, (key,))
                assert (found[first][rest[0]] if rest else found[first]) == value
            elif key not in ("use_kahan_summation", "kahan_sum"):  # which become master_weights
                assert found[key] == value, key
    assert again["weight_decay"] == args.weight_decay
    assert again["max_grad_norm"] == 1.0
    assert args.max_grad_norm == 0
