"""Forked processes after steps with several threads: pytorch/pytorch#17199.

OpenMP's threads do not survive a fork, so whatever waits for several of them hangs in the child: large operators of
torch, and steps. What children usually do must not. All of it is done in one process, which is killed if it hangs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Long, so that one worker has them all: the process takes a while to start.
pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"), pytest.mark.long]

# Far more than all of them take, also under sanitizers; a child that hangs does so for ever.
TIMEOUT = 240

# Large enough for four threads, also in torch's operators, which take 32,768 elements each at least. The threads are
# asleep in their pool when step() returns.
PRELUDE = """
import copy, json, multiprocessing, pickle, traceback
import torch
import fusedopt

SHAPE = (400, 500)


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


def attempt(case):
    torch.set_num_threads(4)
    optimizer = new()
    optimizer.step()
    try:
        case(optimizer)
        said = ""
    except Exception:
        said = traceback.format_exc()
    print(json.dumps([case.__name__, said]), flush=True)
"""

WITH_ONE_THREAD = """
        expected = new()
        expected.step()
        expected.step()

        def steps():
            torch.set_num_threads(1)
            optimizer.load_state_dict(copy.deepcopy(optimizer).state_dict())
            optimizer.step()
            for param, other in zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"]):
                assert torch.equal(param, other)
"""

CASES = {
    # Workers of a data loader, which have one thread each, between steps of several.
    "data_loaders": """
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
    """,
    "children_that_need_no_threads": """
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
    """,
    "children_with_one_thread_may_do_all": f"""{WITH_ONE_THREAD}
        in_child(steps)
        optimizer.step()
    """,
    "children_of_a_process_with_one_thread_may_do_all": f"""{WITH_ONE_THREAD}
        torch.set_num_threads(1)
        in_child(steps)
        torch.set_num_threads(4)
        optimizer.step()
    """,
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case says of its end: nothing if it went well. One that hangs is missing, with those behind it."""
    code = PRELUDE
    for name, body in CASES.items():
        code += f"\ndef {name}(optimizer):\n{textwrap.indent(textwrap.dedent(body), '    ')}\nattempt({name})\n"
    output = tmp_path_factory.mktemp("fork") / "said"
    # Not where the sources are, which would be imported in place of what is installed.
    with (
        output.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=file, start_new_session=True
        ) as process,
    ):
        try:
            process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with its children
    return dict(json.loads(line) for line in output.read_text().splitlines())


@pytest.mark.parametrize("case", CASES)
def test_children_do_what_they_usually_do(case: str, said: dict[str, str]) -> None:
    assert case in said, f"hangs, or one before it does; these ended: {', '.join(said)}"
    assert said[case] == ""
