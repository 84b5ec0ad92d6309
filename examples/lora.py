"""PEFT: a GPT-2 that has read Python's help pages learns to write Python, through adapters alone.

python examples/lora.py [--steps N]
"""

import argparse
from pathlib import Path

import torch
from gpt import load_text
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import fusedopt

LENGTH = 64


def load_source() -> tuple[torch.Tensor, torch.Tensor]:
    text = bytearray(Path(argparse.__file__).read_text(encoding="utf-8").encode())
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    return data[:-16_384], data[-16_384:]


def batch(data: torch.Tensor, step: int, count: int = 16) -> torch.Tensor:
    starts = torch.randint(len(data) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(step))
    return data[starts + torch.arange(LENGTH)]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, steps: int) -> None:
    scheduler = fusedopt.get_scheduler("cosine", optimizer, min(20, steps // 4), steps)
    for step in range(steps):
        words = batch(data, step)
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@torch.no_grad()
def loss_on(model: torch.nn.Module, data: torch.Tensor) -> float:
    words = batch(data, 1_000_000, 128)
    return float(model.eval()(input_ids=words, labels=words).loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=192, n_layer=3, n_head=6, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    optimizer = fusedopt.AdamW(fusedopt.param_groups(model, 0.1), lr=2e-3, max_grad_norm=1.0)
    train(model, optimizer, load_text()[0], steps)

    source, held_out = load_source()
    before = loss_on(model, held_out)
    whole = optimizer.memory_report().state_bytes
    targets = ["c_attn", "c_fc", "c_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=True))
    optimizer = fusedopt.AdamW(adapted.parameters(), lr=5e-3, weight_decay=0.0, max_grad_norm=1.0)
    train(adapted, optimizer, source, steps)
    trained = sum(param.numel() for param in adapted.parameters() if param.requires_grad)
    held = sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())
    print(f"adapters have {trained / sum(param.numel() for param in model.parameters()):.1%} of the parameters")
    print(f"state of the optimizer: {held / 2**20:.2f} MiB, and {whole / 2**20:.2f} MiB for the whole model")
    merged = adapted.merge_and_unload()
    print(f"loss on source code: {before:.2f} before, {loss_on(merged, held_out):.2f} after, adapters merged")


if __name__ == "__main__":
    main()
