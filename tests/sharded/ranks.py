"""Several processes for tests, started once: they join one process group after another and run functions by name."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any

LARGEST_WORLD = 4
# Imported once, in the process that all others are forked from: importing torch takes longer than most tests.
_PRELOADED = [
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "fusedopt",
]
_GROUP_TIMEOUT = timedelta(seconds=60)  # of a collective that not every rank takes part in
_DEADLINE = 240.0  # seconds for one function


class RanksFailedError(AssertionError):
    """What the ranks said that failed."""


@cache
def _module(path: str) -> Any:
    """The module of a file, apart from whatever pytest has imported."""
    spec = importlib.util.spec_from_file_location("of_ranks_" + os.path.basename(path).removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(rank: int, connection: Any) -> None:
    """One process: joins the groups that it is told to join, and runs what it is told to run."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    joined = None
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        world, store, path, name, kwargs = task
        try:
            if joined != store:
                if dist.is_initialized():
                    dist.destroy_process_group()
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
                init = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
                dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT, **init)
                joined = store
            torch.manual_seed(0)
            answer = (True, getattr(_module(path), name)(rank, world, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
            joined = None if not dist.is_initialized() else joined
        connection.send(answer)


class Ranks:
    """Processes that are there for as long as tests run; started when they are first needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._processes: list[tuple[Any, Any]] = []
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        self._stores = itertools.count()
        self._world, self._store = 0, ""
        atexit.register(self.close)

    def __call__(self, world: int, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """What a function of a test's file returns on each rank of a world of that size.

        It is called as function(rank, world, **kwargs). A failure on any rank fails the test; what the others say then
        is that they waited.
        """
        if not self._processes:
            self._start()
        if self._world != world:
            self._world, self._store = world, f"{self._folder}/{next(self._stores)}"
        connections = [connection for _, connection in self._processes[:world]]
        for connection in connections:
            connection.send((world, self._store, function.__code__.co_filename, function.__qualname__, kwargs))
        answers = list(self._answers(connections))
        if not all(went_well for went_well, _ in answers):
            self.close()  # they may be anywhere
            told = [f"rank {rank}: {said}" for rank, (went_well, said) in enumerate(answers) if not went_well]
            raise RanksFailedError("\n".join(told))
        return [answer for _, answer in answers]

    def _answers(self, connections: list[Any]) -> Iterator[tuple[bool, Any]]:
        end = time.monotonic() + _DEADLINE
        for connection in connections:
            try:
                waited = connection.poll(max(0.0, end - time.monotonic()))
                yield connection.recv() if waited else (False, "nothing was heard of it")
            except (EOFError, ConnectionError):
                yield False, "its process has ended"

    def _start(self) -> None:
        for rank in range(LARGEST_WORLD):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))

    def close(self) -> None:
        """Ends the processes; the next call starts others."""
        for process, connection in self._processes:
            with contextlib.suppress(OSError):
                connection.close()
            process.terminate()
        for process, _ in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._processes, self._world = [], 0
        if not self._processes and not os.listdir(self._folder):
            shutil.rmtree(self._folder, ignore_errors=True)
