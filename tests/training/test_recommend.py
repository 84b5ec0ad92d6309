"""Recommendations: what is offered can be built, and what is not known is said."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from cases import peer
from torch import nn

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

from fusedopt.engine.optimizer import CLASSES
from fusedopt.training import Recipe, estimate, recommend
from fusedopt.training.shapes import shape_of_model


@pytest.mark.parametrize(("memory", "devices"), [("12GB", 2), ("10GB", 2), ("8GB", 4), ("12GB", 8), ("24GB", 2)])
def test_what_is_recommended_for_several_devices_steps_under_fsdp2(memory: str, devices: int) -> None:
    for advice in recommend("7B", memory, devices=devices):
        recipe = advice.recipe
        assert "state_device" not in recipe.options  # refused for shards on a GPU
        assert not (recipe.release_gradients and CLASSES[recipe.optimizer].takes_sums)
        assert not advice.estimate.host


def test_what_is_not_known_of_a_model_is_said() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    for advice in recommend(model, "2GB", batch_size=2**20):
        assert advice.recipe.per_device_train_batch_size == 1
        assert advice.estimate.activations is None
        assert any("activations of this model are not known" in reason for reason in advice.reasons)
        assert "of device memory without activations, leaves" in str(advice)
    assert all("not known" not in str(advice) for advice in recommend("125M", "8GB"))


def test_shapes_are_read_where_the_formula_holds() -> None:
    transformers = peer("transformers")
    text = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)
    whole = shape_of_model(_WithConfig(text))
    assert whole is not None
    assert shape_of_model(_WithConfig(types.SimpleNamespace(text_config=text))) == whole
    assert shape_of_model(_WithConfig(transformers.T5Config(num_layers=2))) is None  # its blocks attend twice


class _WithConfig(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


@pytest.mark.parametrize("model", [nn.Linear(8, 8).half(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())])
def test_a_model_that_no_candidate_goes_with_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"torch\..*float16.*in torch.bfloat16 or in torch.float32; call model"):
        recommend(model, "8GB")
    with pytest.raises(ValueError, match="add adapters"):
        recommend(nn.Linear(8, 8), "8GB", task="lora")


@pytest.mark.parametrize(("batch", "devices"), [(24, 1), (7, 1), (8, 1), (100, 4)])
def test_micro_batches_add_up_to_the_batch(batch: int, devices: int) -> None:
    for advice in recommend("7B", "24GB", batch_size=batch, devices=devices, task="lora"):
        recipe = advice.recipe
        assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * devices == batch


@pytest.mark.parametrize("name", ["batch_size", "sequence_length", "devices"])
def test_counts_below_1_are_errors(name: str) -> None:
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"{name}={wrong} counts nothing"):
            recommend("125M", "8GB", **{name: wrong})
        if name != "batch_size":
            with pytest.raises(ValueError, match=f"{name}={wrong} counts nothing"):
                estimate("125M", Recipe(), **{name: wrong})


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is quantized in the small models
        yield
