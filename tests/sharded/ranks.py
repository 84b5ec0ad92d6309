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

# Imported once, in the process that all others are forked from: importing torch takes longer than most tests.
_PRELOADED = [
    "torch",
    "torch._dynamo",  # as the first optimizer does
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


def _serve(rank: int, world: int, store: str, connection: Any) -> None:
    """One process: joins the group of its world, and runs what it is told to run."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    while True:
        try:
            path, name, kwargs = connection.recv()
        except EOFError:
            return
        try:
            if not dist.is_initialized():
                init = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
                dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT, **init)
            torch.manual_seed(0)
            answer = (True, getattr(_module(path), name)(rank, world, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


class Ranks:
    """Processes that are there for as long as tests run; those of a world are started when it is first needed.

    A process stays in its world: torch remembers what it works out about meshes, groups that are gone included.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._worlds: dict[int, list[tuple[Any, Any]]] = {}
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        self._stores = itertools.count()
        atexit.register(self.close)

    def __call__(self, world: int, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """What a function of a test's file returns on each rank of a world of that size.

        It is called as function(rank, world, **kwargs). A failure on any rank fails the test; what the others say then
        is that they waited.
        """
        if world not in self._worlds:
            self._start(world)
        connections = [connection for _, connection in self._worlds[world]]
        for connection in connections:
            connection.send((function.__code__.co_filename, function.__qualname__, kwargs))
        answers = list(self._answers(connections))
        if not all(went_well for went_well, _ in answers):
            self._end(world)  # they may be anywhere
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

    def _start(self, world: int) -> None:
        store = f"{self._folder}/{next(self._stores)}"
        self._worlds[world] = []
        for rank in range(world):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._worlds[world].append((process, ours))

    def _end(self, world: int) -> None:
        processes = self._worlds.pop(world)
        for process, connection in processes:
            with contextlib.suppress(OSError):
                connection.close()
            process.terminate()
        for process, _ in processes:
            process.join(5)
            if process.is_alive():
                process.kill()

    def close(self) -> None:
        """Ends the processes; the next call starts others."""
        for world in list(self._worlds):
            self._end(world)
        shutil.rmtree(self._folder, ignore_errors=True)
