"""The headers with which CUDA kernels compile with g++ and run on the CPU (tests/cuda_on_cpu)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_selftest import (
    DIVERGENCES,
    HERE,
    INVALID_CONFIGURATION,
    THROWN,
    Device,
    compile_for_cpu,
    dim3,
    pattern_of,
    pointer,
)


@pytest.fixture(scope="module", params=["assembly", "ucontext"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """Both ways to switch stacks; where there is no assembly, it is the same one twice."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    define = ["-DCUDA_ON_CPU_UCONTEXT"] if request.param == "ucontext" else []
    arguments = [*define, "-fPIC", "-shared", str(HERE / "selftest.cpp"), "-o", "selftest.so"]
    compiled = compile_for_cpu(arguments, folder)
    assert compiled.returncode == 0, compiled.stderr
    return Device(folder / "selftest.so")


@pytest.fixture(params=range(4))
def order(request: pytest.FixtureRequest, device: Device) -> Any:
    device.set_order(request.param)
    yield request.param
    device.set_order(0)


def _numbers(count: int, limit: int = 2**20) -> np.ndarray:
    return np.random.default_rng(count).integers(0, limit, count).astype(np.uint32)


# ----------------------------------------------------------------------------------------------------------------------
# What converges gives what CUDA documents, in any order.


def test_block_sums(device: Device, order: int) -> None:
    for blocks, threads in ((3, 32), (7, 256), (2, 1024)):
        given = _numbers(blocks * threads, 2**10)
        output = device("sums", blocks, threads, given, 2 * blocks).reshape(blocks, 2)
        expected = given.reshape(blocks, threads).sum(1)
        assert np.array_equal(output[:, 0], expected)
        halves = np.ascontiguousarray(output[:, 1]).view(np.float32)
        assert np.array_equal(halves, expected.astype(np.float32) / 2)  # all partial sums are exact


def test_indices_in_three_dimensions(device: Device, order: int) -> None:
    grid, threads = (3, 2, 4), (5, 4, 3)
    output = device("indices", grid, threads, [0], 24 * 60 * 12).reshape(-1, 4, 3)
    expected = [
        ((x, y, z), (a, b, c), threads, grid)
        for c in range(grid[2])
        for b in range(grid[1])
        for a in range(grid[0])
        for z in range(threads[2])
        for y in range(threads[1])
        for x in range(threads[0])
    ]
    assert np.array_equal(output, expected)


def test_atomics_over_blocks(device: Device, order: int) -> None:
    given = _numbers(5 * 96, 1000)
    output = np.zeros(26, np.uint32)
    output[10], output[13] = 5000, 0xFFFFFFFF
    output[11] = 2**32 - 5000
    assert device.launch("atomics", 5, 96, given, output) == 0
    total, n = int(given.sum()), len(given)
    assert np.array_equal(output[:8], np.bincount(given % 8, minlength=8))
    assert output.view(np.int32)[8] == -total
    assert [output[9], output[10]] == [given.max(), given.min()]
    assert output.view(np.int32)[11] == -int(given.min())
    assert output[12] == np.bitwise_or.reduce(given)
    assert output[13] == np.bitwise_and.reduce(given | 0xF0)
    assert output[14] == n % 7
    assert output.view(np.float32)[15] == n / 4
    assert output.view(np.uint64)[8] == n * 0x100000001
    assert output.view(np.float64)[9] == n / 2
    assert output.view(np.uint64)[10] == 0x100000000 + int(given.max())
    assert list(output[22:25]) == [total, 1, 7]


def test_votes_and_reductions(device: Device, order: int) -> None:
    given = _numbers(32, 90)
    given[7] = 3
    output = device("votes", 1, 32, given, 32 * 12).reshape(32, 12)
    halves = np.repeat(given.reshape(2, 16), 16, axis=0)

    def ballot(predicate: np.ndarray) -> int:
        return sum(1 << lane for lane in range(32) if predicate[lane])

    first, bits = np.arange(32) < 16, ballot(given & 2)
    columns = [
        ballot(given & 1),
        1,
        1,
        np.where(first, bits & 0xFFFF, bits & 0xFFFF0000),
        given.sum(),
        given.max(),
        halves.min(1),
        (int(given.max()) - 45) % 2**32,
        (int(given.min()) - 45) % 2**32,
        (int(given.sum()) - 45 * 32) % 2**32,
        np.bitwise_or.reduce(given),
        np.bitwise_and.reduce(halves, axis=1),
    ]
    for k, column in enumerate(columns):
        assert np.array_equal(output[:, k], np.broadcast_to(column, 32)), k
    given[20] = 100
    assert not device("votes", 1, 32, given, 32 * 12).reshape(32, 12)[:, 2].any()


def test_shuffles(device: Device, order: int) -> None:
    given = _numbers(32)
    output = device("shuffles", 1, 32, given, 32 * 12).reshape(32, 12)
    lane = np.arange(32)
    sources = [
        np.full(32, 5),
        lane // 8 * 8 + lane * 7 % 8,
        np.where(lane < 3, lane, lane - 3),
        np.where(lane % 16 < 3, lane, lane - 3),
        np.where(lane + 5 > 31, lane, lane + 5),
        np.where(lane % 8 + 5 > 7, lane, lane + 5),
        lane ^ 9,
        np.where((lane ^ 9) > (lane | 7), lane, lane ^ 9),
        lane ^ 1,
        np.minimum(lane + 1, 31),
    ]
    for k, source in enumerate(sources):
        assert np.array_equal(output[:, k], given[source]), k
    assert np.array_equal(output[:, 10].view(np.int32), np.full(32, -int(given[31])))
    assert np.array_equal(output[:, 11], np.where(lane % 2, given[9], 0))


def test_intrinsic_functions(device: Device) -> None:
    a, b = 0x00C0FFE0, 0x89ABCDEF
    x, y, z = np.float32(1.1), np.float32(3.3), np.float32(-3.63)
    floats = np.array([x, y, z]).view(np.uint32)
    output = device("intrinsics", 1, 1, [a, b, *floats], 18)
    reversed_bits = int(f"{a:032b}"[::-1], 2)
    both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    permuted = int.from_bytes(bytes(both[k] for k in (0, 5, 1, 7)), "little")
    integers = [13, 8, 6, reversed_bits, permuted, a * b >> 32, (b << 9 | a >> 23) % 2**32]
    assert list(output[:7]) == integers
    fused = np.float32(float(x) * float(y) + float(z))  # the double sum is exact here
    assert np.float32(x * y) + z != fused
    rounded = np.array([x + y, x - y, np.float32(x * y) + z, x / y, np.sqrt(x), fused], np.float32)
    assert np.array_equal(output[7:13], rounded.view(np.uint32))
    assert list(output[13:16]) == [a, b, 32]
    d = np.float64(x)
    assert output.view(np.float64)[8] == d + d * (1 / np.sqrt(d))


def test_sums_are_rounded_down(device: Device) -> None:
    """Against fractions: of any exponents, of neighbours, and of what overflows, is zero or is not finite."""
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 2**32, (1000, 2)).astype(np.uint32)
    pairs[::2, 1] = pairs[::2, 0] ^ generator.integers(0, 2**25, 500).astype(np.uint32) ^ np.uint32(2**31)
    limits = np.array([0.0, -0.0, 1e-45, 1.0, 3.4028235e38, np.inf], np.float32)
    special = [(x, y) for a in limits for b in limits for x in (a, -a) for y in (b, -b)]
    pairs = np.concatenate([pairs, np.array(special, np.float32).view(np.uint32)])[: 32 * 32]
    found = device("sums_rounded_down", 1, len(pairs), pairs.ravel(), len(pairs)).view(np.float32)
    for (a, b), total in zip(pairs.view(np.float32), found, strict=True):
        if not (np.isfinite(a) and np.isfinite(b)):
            with np.errstate(invalid="ignore"):
                assert np.isnan(total) if np.isnan(a + b) else total == a + b
        elif np.isinf(total):
            assert Fraction(float(a)) + Fraction(float(b)) < Fraction(float(-limits[4])), (a, b, total)
        else:
            exact, above = Fraction(float(a)) + Fraction(float(b)), np.nextafter(total, np.float32(np.inf))
            assert Fraction(float(total)) <= exact, (a, b)
            assert np.isinf(above) or exact < Fraction(float(above)), (a, b)
            if exact == 0:  # -0, but of 0 and 0
                assert np.signbit(total) != (a == b and not np.signbit(a) and not np.signbit(b)), (a, b)


def test_numbers_are_those_of_ieee_whatever_the_host_does(device: Device) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that can flush subnormals")
    output = device("intrinsics", 1, 1, [0, 0, 3, 4, 0], 18)
    assert output[7] == 7, "two subnormals were added"
    assert torch.full((1,), 1e-40) * 1 == 0, "the host flushes as before"


def test_vector_loads_and_stores(device: Device) -> None:
    given = _aligned(_numbers(4 * 64))
    output = _aligned(np.zeros(8 * 64, np.uint32))
    assert device.launch("vectors", 1, 64, given, output) == 0
    rows = given.reshape(64, 4)
    assert np.array_equal(output.reshape(64, 8)[:, :4], rows[:, ::-1])
    assert np.array_equal(output.reshape(64, 8)[:, 4:6], rows[:, 1::-1])
    assert (output.reshape(64, 8)[:, 6:] == given[:2]).all()


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 64 bytes."""
    space = np.zeros(array.nbytes + 64, np.uint8)
    start = -space.ctypes.data % 64
    copy = space[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


@pytest.mark.parametrize(("kernel", "size"), [("misaligned_load", 16), ("misaligned_store", 8)])
def test_misaligned_vectors_are_caught(device: Device, kernel: str, size: int) -> None:
    error = device.launch(kernel, 1, 2, _aligned(np.zeros(64, np.uint32)), _aligned(np.zeros(64, np.uint32)))
    assert error == THROWN
    assert f"accesses {size} bytes at a misaligned address through __" in device.message()


@pytest.mark.parametrize(
    ("kernel", "accessed"),
    [
        ("misaligned_vector", "'const struct uint4'"),
        ("misaligned_vector_store", "'struct uint2'"),
        ("misaligned_number", "'const unsigned int'"),
    ],
)
def test_misaligned_addresses_of_plain_accesses_are_caught(device: Device, kernel: str, accessed: str) -> None:
    error = device.launch(kernel, 1, 2, _aligned(np.zeros(64, np.uint32)), _aligned(np.zeros(64, np.uint32)))
    assert error == THROWN
    said = rf"thread \([01],0,0\) \(warp 0, lane [01]\) accesses {accessed} at a misaligned address at \S*\.cuh:\d+\.$"
    assert re.match(r"In block \(0,0,0\), " + said, device.message()), device.message()


def test_shared_memory_is_poisoned_before_every_block(device: Device, order: int) -> None:
    output = device("reads_before_writing", 3, 8, [0], 3 * 8 * 6).reshape(-1, 6)
    assert (output == [0xFFFFFFFF, 0xFFFFFFFF, 0xFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]).all()


def test_launches_leave_variables_of_the_hosts_threads_alone(device: Device) -> None:
    device.library.selftest_kept(7)
    device("reads_before_writing", 3, 8, [0], 3 * 8 * 6)
    assert device.library.selftest_kept(8) == 7
    with pytest.raises(RuntimeError):
        device("traps", 3, 64, [0], 1)
    assert device.library.selftest_kept(0) == 8


def test_any_thread_of_the_host_may_launch(device: Device) -> None:
    given = _numbers(7 * 256, 2**10)
    expected = given.reshape(7, 256).sum(1)

    def run(_: int) -> bool:
        output = device("sums", 7, 256, given, 14)[::2]
        poisoned = device("reads_before_writing", 3, 8, [0], 3 * 8 * 6)[::6]
        return np.array_equal(output, expected) and (poisoned == 0xFFFFFFFF).all()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))


def test_parameters_are_passed_by_value(device: Device) -> None:
    output = np.zeros(2 * 64, np.uint32)
    assert device.library.selftest_parameters(dim3(2), dim3(64), 7, pointer(output)) == 0
    assert (output == 8007).all()


def test_part_of_a_warp_may_meet_while_the_rest_waits(device: Device, order: int) -> None:
    given = _numbers(32, 1000)
    given[:] = 2 * given  # so that all lanes go one way
    expected = np.full(32, given.sum()) + np.where(np.arange(32) < 8, given[:8].sum(), 0)
    assert np.array_equal(device("meets_in_parts", 1, 32, given, 32), expected)


def test_one_operation_may_be_called_from_two_places(device: Device, order: int) -> None:
    given = _numbers(32, 1000)
    assert {0, 1} == set(given % 2)
    expected = np.full(32, given.sum()) + np.where(np.arange(32) < 8, given[:8].sum(), 0)
    assert np.array_equal(device("meets_in_parts", 1, 32, given, 32), expected)


# ----------------------------------------------------------------------------------------------------------------------
# What does not converge is said, and does no harm.


@pytest.mark.parametrize("kernel", DIVERGENCES)
def test_divergence_is_caught_in_any_order(device: Device, order: int, kernel: str) -> None:
    threads = 20 if kernel == "mask_names_absent_lane" else 32 if "<X 31>" in DIVERGENCES[kernel][0] else 64
    with pytest.raises(RuntimeError) as error:
        device(kernel, 3, threads, [0], 1024)
    assert re.fullmatch(pattern_of(kernel), str(error.value)), str(error.value)

    given = _numbers(256, 2**10)  # usable again
    assert device("sums", 1, 256, given, 2)[0] == given.sum()


def test_stacks_are_used_again_after_errors(device: Device) -> None:
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    def fail() -> None:
        with pytest.raises(RuntimeError):
            device("barrier_in_branch", 1, 32, [0], 1)

    fail()
    before = mappings()
    for _ in range(100):
        fail()  # of 32 threads
    assert mappings() < before + 1000


def test_exceptions_of_kernels_come_out_of_the_launch(device: Device, order: int) -> None:
    with pytest.raises(RuntimeError, match=r"^thrown by a kernel$"):
        device("throws", 2, 64, [0], 1)
    given = _numbers(256, 2**10)
    assert device("sums", 1, 256, given, 2)[0] == given.sum()


def test_kernels_launch_no_kernels(device: Device) -> None:
    with pytest.raises(RuntimeError, match="launches a kernel, which is not emulated"):
        device("launches", 1, 1, [0], 1)
    assert (device("does_little", 1, 64, [5], 64) == 5).all()


def test_limits_of_a_launch(device: Device) -> None:
    output = np.zeros(1, np.uint32)
    grids = [0, (1, 0), (2**31,), (1, 65536), (1, 1, 65536)]
    blocks = [0, 1025, (32, 33), (1, 1, 65), (2**16, 2**16)]
    for grid, threads in [(grid, 1) for grid in grids] + [(1, threads) for threads in blocks]:
        assert device.launch("traps", grid, threads, [0], output) == INVALID_CONFIGURATION, (grid, threads)
    assert (device("does_little", (2, 3), (16, 32, 2), [3], 6 * 1024) == 3).all()


def test_runtime_interface(device: Device) -> None:
    assert device.library.selftest_runtime() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Orders.


def test_racy_code_shows_when_the_order_changes(device: Device) -> None:
    def runs(kernel: str, grid: int, size: int) -> set[bytes]:
        results = set()
        for seed in range(6):
            device.set_order(seed)
            results.add(device(kernel, grid, 64, given, size).tobytes())
            again = device(kernel, grid, 64, given, size).tobytes()
            assert again in results, "the same order gives the same result"
        device.set_order(0)
        return results

    given = _numbers(4 * 64)
    assert len(runs("reverses", 4, 4 * 64)) == 1
    assert len(runs("reverses_without_barrier", 1, 64)) == 6
    assert len(runs("takes_tickets", 4, 1 + 4 * 64)) == 6


def test_blocks_run_in_any_order_each_once(device: Device, order: int) -> None:
    tickets = device("takes_tickets", (5, 2, 3), 1, [0], 31)[1:]
    assert sorted(tickets) == list(range(30))
    assert (list(tickets) == list(range(30))) == (order == 0)


# ----------------------------------------------------------------------------------------------------------------------
# Speed.


def _threads_per_second(run: Callable[[], object], threads: int) -> float:
    best = min(_seconds(run) for _ in range(5))
    return threads / best


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_speed(device: Device) -> None:
    """A lax bound: many kernels of thousands of threads are to run in a test."""
    given = _numbers(64 * 256, 2**10)
    for kernel in ("does_little", "reverses", "sums"):
        speed = _threads_per_second(lambda kernel=kernel: device(kernel, 64, 256, given, 64 * 256), 64 * 256)
        print(f"{kernel}: {speed / 1e6:.2f} million threads a second")
        assert speed > 1e4
