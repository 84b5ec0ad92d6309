"""The Triton kernels compile without a GPU, into what they should, and no oftener than that."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


# All kernels take a minute for each target, and are the same for all targets. So here every 24th one is compiled for
# AMD, and for NVIDIA those that training takes.
EVERY = "24"
TARGETS = [("cuda:80", "cubin"), ("cuda:90", "cubin"), ("cuda:100", "cubin"), ("hip:gfx942", "hsaco")]


def run(cache: Path, *tasks: str) -> list[Any]:
    """What tasks of triton_compiled.py find, in one process with an empty cache."""
    paths = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(TESTS)]).lstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(TESTS / "triton_compiled.py"), *tasks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(tasks) :]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all tasks but the slow ones find, by task. They share a process, and what they compile."""
    tasks = [
        "training cuda:90",
        f"all hip:gfx942 0 {EVERY}",
        "scaled_roots hip:gfx942",
        "norms hip:gfx942",
        "instructions cuda:90",
    ]
    return dict(zip(tasks, run(tmp_path_factory.mktemp("triton"), *tasks)))


@pytest.mark.long
def test_kernels_compile_for_amd(found: dict[str, Any]) -> None:
    kernels = found[f"all hip:gfx942 0 {EVERY}"]
    assert len(kernels) >= 80 // int(EVERY)
    assert all("hsaco" in stages for stages in kernels.values())


@pytest.mark.long
def test_steps_that_take_norms_compile(found: dict[str, Any]) -> None:
    """For AMD; for NVIDIA, training does."""
    kernels = found["norms hip:gfx942"]
    assert len(kernels) == 2
    assert all("hsaco" in stages for stages in kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize(("target", "made"), TARGETS)
def test_every_kernel_compiles(tmp_path: Path, target: str, made: str) -> None:
    (kernels,) = run(tmp_path, f"all {target} 0 1")
    assert len(kernels) >= 80
    assert all(made in stages for stages in kernels.values())


@pytest.mark.long
def test_roots_never_meet_subnormal_numbers_on_amd(found: dict[str, Any]) -> None:
    """There, releases of Triton differ in what they make of them: each is scaled before."""
    counts = found["scaled_roots hip:gfx942"]
    assert any(roots > 0 for roots, _ in counts.values())
    assert all((scaled > 0) == (roots > 0) for roots, scaled in counts.values())  # one product may be of a vector


@pytest.mark.long
def test_whole_tiles_are_moved_in_vectors_and_nothing_is_contracted(found: dict[str, Any]) -> None:
    for formats, counts in found["instructions cuda:90"].items():
        if "preparation" in formats:
            continue  # where steps are raised to powers: in double, by the toolkit's logarithm
        for name in counts:
            assert not name.startswith(("fma", "mad", "rcp")), (formats, name)
            assert "ftz" not in name, (formats, name)
            assert "approx" not in name, (formats, name)
            assert "full" not in name, (formats, name)
        if formats.startswith("adafactor_matrix") and "unit" not in formats:  # sums of float32 gradients
            assert counts["ld.global.v2.b32"] % 4 == 0  # a thread has two elements, and four loads on their way
        if not formats.startswith(("float32", "bfloat16")):
            continue
        # A thread has 8 elements of a tile: of float32 two accesses of 16 bytes, of 16 bits one, of 8 bits one of 8.
        word = int(formats.split()[1], 16)
        of_16_bytes = {0: (2 * 4, 2 * 3)}.get(word, (4, 3))
        if formats.startswith("bfloat16/8bit"):
            has_codes = (word >> 13) & 7 == 3
            of_16_bytes = (2, 1) if has_codes else (2 + 4, 1 + 4)
        assert counts["ld.global.v4.b32"] == of_16_bytes[0], formats
        assert counts["st.global.v4.b32"] == of_16_bytes[1], formats
        assert counts["div.rn.f32"] > 0
        assert counts["sqrt.rn.f32"] > 0


@pytest.mark.long
def test_a_schedule_compiles_nothing(found: dict[str, Any]) -> None:
    """All that is compiled ahead is found in the first step: what it launches has the same key."""
    for ahead, first, last in found["training cuda:90"]:
        assert ahead == first == last
        assert ahead > 0


def test_targets_and_formats_are_checked() -> None:
    """In one process, in which Triton does not interpret."""
    pytest.importorskip("typer")
    commands = {
        "target 'cuda' is not known; write cuda:": ["--target", "cuda", "--norms"],
        "formats 'bf16' are not PARAMETERS/STATES": ["--target", "cuda:90", "--formats", "bf16"],
        "rule": ["--target", "cuda:90", "--rules", "adamx"],
    }
    code = """
import json, sys
from fusedopt.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = ["compile-kernels", *arguments]
    try:
        main()
    except SystemExit as end:
        print(end.code)
"""
    run = [sys.executable, "-P", "-c", code, json.dumps(list(commands.values()))]
    done = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]
    for message, said in zip(commands, done.stderr.splitlines(), strict=True):
        assert message in said
