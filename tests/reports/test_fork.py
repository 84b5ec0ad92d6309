"""Forked processes after steps with several threads: pytorch/pytorch#17199.

OpenMP's threads do not survive a fork, so whatever waits for several of them hangs in the child: large operators of
torch, and steps. What children usually do must not. Each test is a process of its own, which may be killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Far more than any of them takes, also under sanitizers; a child that hangs does so for ever.
TIMEOUT = 120

# Large enough for several threads, which step() then uses; they are asleep in their pool when it returns.
PRELUDE = """
import copy, multiprocessing, pickle, sys
import torch
import fusedopt

SHAPE = (1000, 1000)


def new(shape=SHAPE):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    for param in params:
        param.grad = torch.randn(shape)
    return fusedopt.AdamW(params, state_dtype="8bit")


def in_child(target):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode


torch.set_num_threads(4)
optimizer = new()
optimizer.step()
"""


def run(script: str) -> None:
    code = PRELUDE + textwrap.dedent(script)
    # Not where the sources are, which would be imported in place of what is installed.
    here = Path(__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=here, start_new_session=True) as process:
        try:
            assert process.wait(timeout=TIMEOUT) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # with its children


def test_data_loaders() -> None:
    """Workers of a data loader, which have one thread each, between steps of several."""
    run(
        """
        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                x = torch.arange(float(index), index + 1000) % 8  # small whole numbers: exact in any order
                product = x.view(10, 100) @ x.view(100, 10)
                return (product.amax() - torch.ones(SHAPE).sum()) / 2**20 + torch.randn(3).numel()

        runs = []
        for workers in (0, 2):
            context = "fork" if workers else None
            other = copy.deepcopy(optimizer)
            for _ in range(2):
                loader = torch.utils.data.DataLoader(Data(), 2, num_workers=workers, multiprocessing_context=context)
                batches = list(loader)
                for batch in batches:
                    for param in other.param_groups[0]["params"]:
                        param.grad = torch.full_like(param, float(batch.mean()))
                    other.step()
            runs.append((torch.cat(batches), *other.param_groups[0]["params"]))
        assert all(torch.equal(a, b) for a, b in zip(*runs))
        """
    )


def test_children_that_need_no_threads() -> None:
    run(
        """
        small = new((16, 16))
        small.step()
        pickled = pickle.dumps(optimizer)
        for target in (
            lambda: optimizer.state_dict(),
            lambda: pickle.dumps(optimizer),
            lambda: pickle.loads(pickled),
            lambda: optimizer.memory_report(),
            lambda: optimizer.zero_grad(),
            lambda: fusedopt.AdamW(optimizer.param_groups[0]["params"]),
            lambda: copy.deepcopy(small),
            lambda: small.load_state_dict(small.state_dict()),
            lambda: small.step(),
        ):
            in_child(target)
        optimizer.step()
        """
    )


@pytest.mark.parametrize("where", ["in the child", "before the fork"])
def test_children_with_one_thread_may_do_all(where: str) -> None:
    run(
        f"""
        expected = new()
        expected.step()
        expected.step()

        def steps():
            torch.set_num_threads(1)
            optimizer.load_state_dict(copy.deepcopy(optimizer).state_dict())
            optimizer.step()
            for param, other in zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"]):
                assert torch.equal(param, other)

        if {where!r} == "before the fork":
            torch.set_num_threads(1)
        in_child(steps)
        torch.set_num_threads(4)
        optimizer.step()
        """
    )
