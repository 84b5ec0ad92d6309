"""PEFT: LoRA's adapters are stepped, the rest stays; adapters merge, and may be added later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import peer
from trainers import LENGTH, VOCABULARY, gpt2

import fusedopt

peft = peer("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT about GPT-2's transposed layers

STEPS = 4


def adapted() -> Any:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn"], init_lora_weights=True, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(gpt2(), config)


def words(step: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(step))


def train(model: Any, optimizer: Any, steps: range = range(STEPS)) -> None:
    model.eval()  # no dropout, so that runs can be compared
    for step in steps:
        model(input_ids=words(step), labels=words(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def test_adapters_only() -> None:
    """Handed all parameters, it makes state for those that train, and moves nothing else."""
    model = adapted()
    before = copies(model)
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer)
    for name, param in model.named_parameters():
        assert ("lora_" in name) == param.requires_grad
        assert torch.equal(param, before[name]) != ("lora_" in name), name
        assert (param in optimizer.state) == ("lora_" in name)
    assert optimizer.memory_report().ours["exp_avg"] > 0


def test_as_with_torch_and_merged() -> None:
    """The merged weights are those that torch's AdamW trains, up to rounding."""
    merged = []
    for cls in (fusedopt.AdamW, torch.optim.AdamW):
        model = adapted()
        trained = [param for param in model.parameters() if param.requires_grad]
        train(model, cls(trained, lr=1e-2, weight_decay=0.1))
        logits = model(input_ids=words(9)).logits
        model = model.merge_and_unload()
        # B A is added to the weight instead of applied beside it, in float32.
        torch.testing.assert_close(model(input_ids=words(9)).logits, logits, rtol=1e-4, atol=1e-5)
        merged.append(copies(model))
    for name, ours in merged[0].items():
        torch.testing.assert_close(ours, merged[1][name], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_added_later() -> None:
    """A new param group; the first adapter's state goes on."""
    model = adapted()
    optimizer = fusedopt.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, state_dtype="bfloat16")
    train(model, optimizer)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["c_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    known = {p for group in optimizer.param_groups for p in group["params"]}
    added = [p for p in model.parameters() if p.requires_grad and p not in known]
    assert added
    optimizer.add_param_group({"params": added, "lr": 1e-3})
    before = copies(model)
    train(model, optimizer, range(STEPS, 2 * STEPS))
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert any(".second." in name for name in moved)
    assert any(".default." in name for name in moved)
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS, 2 * STEPS}


def test_saved_and_resumed(tmp_path: Any) -> None:
    whole = adapted()
    optimizer = fusedopt.AdamW(fusedopt.param_groups(whole), lr=1e-2, master_weights=None)
    train(whole, optimizer)
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(whole, optimizer, range(STEPS, 2 * STEPS))
    resumed = peft.PeftModel.from_pretrained(gpt2(), tmp_path, is_trainable=True)
    again = fusedopt.AdamW(fusedopt.param_groups(resumed), lr=1.0)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, again, range(STEPS, 2 * STEPS))
    first, second = copies(whole), copies(resumed)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
