"""`make gpu-check`: builds for the GPU that is here, tests and measures, in eight minutes, and loses nothing if cut.

    python bench/gpu_check.py --out out/gpu

Offline, with the packages of the interpreter that runs it. docs/cuda.md has the stages and their seconds. Every result
is appended to results.jsonl in --out as it comes; log.txt has what was printed, and summary.txt the figures, beside
what was predicted. What is built goes to another folder. `--summary` reads the results of a folder once more, and
`--dry` runs everything on the CPU, with tiny tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.gpu_record import ABSENT, RESULTS, RUNNING, SHARD, STAGE, Results, last_run, read, tail  # noqa: E402
from bench.gpu_stages import FACTS_SECONDS, TOTAL_SECONDS, Stage, interpreted, stages  # noqa: E402
from bench.gpu_summary import render  # noqa: E402

GRACE_SECONDS = 5.0  # between an interrupt and the end, for those who have something to write
LOG_BYTES = 8 * 2**20
# Where CUDA's tools are, if they are not on the PATH.
TOOL_FOLDERS = (
    Path(sys.executable).parent,
    Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin",
    *sorted(Path("/opt/nvidia/nsight-compute").glob("*")),
)
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """Somebody ended the check by a signal."""


def stop_in_order() -> None:
    """From now on a signal that would end this process ends the stage, and the results are told so."""
    for each in ENDING:
        signal.signal(each, _stop)


def _stop(number: int, frame: object) -> None:
    if _arrived is not None:
        _arrived.append(number)
        return
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


_arrived: list[int] | None = None  # signals that wait until what is being done is done; None if they need not


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What is done here is done whole: a signal that arrives meanwhile ends this process right after it."""
    global _arrived  # not a mask of signals, which one of the other threads would take instead
    _arrived = []
    try:
        yield
    finally:
        arrived, _arrived = _arrived, None
        if arrived:
            _stop(arrived[0], None)


def _in_a_group_of_its_own() -> None:
    """A stage can be interrupted with everything that it started, and ends if this process is killed."""
    os.setpgid(0, 0)
    for each in ENDING:
        signal.signal(each, signal.SIG_DFL)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Check:
    """Runs stages one after the other.

    Args:
        out: Folder for the results.
        work: Folder for everything else.
        dry: Whether it runs on the CPU.
    """

    def __init__(self, out: Path, work: Path, dry: bool = False) -> None:
        self.out = out
        self.work = work
        self.dry = dry
        self.results = Results(out / "results.jsonl")
        self.log = out / "log.txt"
        self.running = work / "running"
        self.outcomes: dict[str, str] = {}

    def environment(self, stage: Stage, number: int) -> dict[str, str]:
        """What a process of a stage finds: the package that was built comes before the sources."""
        site = stage.site or self.work / "site"
        inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        found = {
            **os.environ,
            "PATH": path_with_tools(),
            "PYTHONPATH": os.pathsep.join([str(site), *inherited, str(ROOT)]),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "OMP_WAIT_POLICY": "passive",
            RESULTS: str(self.results.path),
            STAGE: stage.name,
            SHARD: f"{number}/{stage.processes}",
            RUNNING: str(self.running),
        }
        if stage.processes > 1:
            found["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // stage.processes))
        found.pop("FUSEDOPT_GPU_DRY", None)
        if self.dry:
            found.update(FUSEDOPT_GPU_DRY="1", TRITON_INTERPRET="1")
        return found

    def facts(self, limit: float) -> dict[str, Any]:
        """Versions and the device; a sentence as "error" if they cannot be had."""
        stage = Stage("facts", limit, ["-m", "bench.gpu_facts"])
        try:
            done = subprocess.run(
                interpreted(stage),
                capture_output=True,
                text=True,
                timeout=limit,
                env=self.environment(stage, 0),
                cwd=self.work,
            )
            return json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            return {"error": f"not known after {limit:g} s"}
        except (IndexError, ValueError):
            return {"error": tail(done.stdout + done.stderr)}

    def run_all(self, planned: Sequence[Stage], scale: float = 1.0, begun: float | None = None) -> int:
        """Runs the stages; 0 if none failed or was cut off.

        Args:
            planned: In their order.
            scale: What limits are multiplied with.
            begun: When the first second was, by the monotonic clock.
        """
        deadline = begun if begun is not None else time.monotonic()
        stopped = ""
        try:
            for stage in planned:
                deadline += stage.limit * scale
                self._run(stage, deadline, scale)
                self._summarize()
        except Stopped as error:
            stopped = str(error)
        failed = [name for name, outcome in self.outcomes.items() if outcome in ("failed", "cut off")]
        fields = {"stopped": stopped} if stopped else {}
        self.results.add("end", failed=failed, **fields)
        print(self._summarize())
        return 1 if failed or stopped else 0

    def _run(self, stage: Stage, deadline: float, scale: float) -> None:
        begun = time.monotonic()
        reason = stage.missing()
        fields: dict[str, Any] = {"reason": reason}
        outcome = "absent"
        if reason:
            with _undisturbed():
                self._finish(stage, outcome, begun, None, fields)
            return
        self.log.touch()
        size = self.log.stat().st_size
        try:
            with _undisturbed():
                self.results.add("begin", of=stage.name, may_take=round(deadline - begun, 1))
            print(f"{stage.name} ...", flush=True)
            outcome, fields = self._run_processes(stage, deadline, scale)
        except BaseException as error:
            outcome, fields = "cut off", {"reason": str(error) or type(error).__name__}
            raise
        finally:
            with _undisturbed():  # what has begun has an outcome
                self._finish(stage, outcome, begun, size, fields)

    def _finish(self, stage: Stage, outcome: str, begun: float, log_from: int | None, fields: dict[str, Any]) -> None:
        """Records how a stage ended, with the end of what it printed if it did not end well."""
        fields = dict(fields)
        said = ""
        if log_from is not None:
            with self.log.open("rb") as file:
                file.seek(log_from)
                said = file.read()[-100_000:].decode(errors="replace")
            if outcome == "absent":
                fields["reason"] = next((line for line in reversed(said.splitlines()) if line.strip()), "")
            elif outcome != "passed":
                fields["lines"] = tail(said)
            if outcome != "passed" and self.running.exists():
                names = [path.read_text() for path in sorted(self.running.glob(f"{stage.name}-*"))]
                fields.update({"running": names} if names else {})
            self._shorten_log()
        self.outcomes[stage.name] = outcome
        seconds = round(time.monotonic() - begun, 1)
        self.results.add("stage", name=stage.name, outcome=outcome, seconds=seconds, limit=stage.limit, **fields)
        why = f" ({fields['reason']})" if fields.get("reason") else ""
        if outcome in ("failed", "cut off"):
            print(tail(said, 20))
        print(f"{stage.name}: {outcome}{why}, {seconds:g} s\n", flush=True)

    def _run_processes(self, stage: Stage, deadline: float, scale: float) -> tuple[str, dict[str, Any]]:
        grace = min(GRACE_SECONDS, 0.25 * stage.limit * scale)
        processes: list[subprocess.Popen[bytes]] = []
        with self.log.open("ab") as log:
            log.write(f"== {stage.name}\n".encode())
            log.flush()
            try:
                for number in range(stage.processes):
                    with _undisturbed():  # whoever is started is in the list of those to end
                        processes.append(
                            subprocess.Popen(
                                interpreted(stage),
                                stdin=subprocess.DEVNULL,
                                stdout=log,
                                stderr=subprocess.STDOUT,
                                env=self.environment(stage, number),
                                cwd=self.work,
                                preexec_fn=_in_a_group_of_its_own,
                            )
                        )
                in_time = _wait(processes, deadline - grace)
            finally:
                _end(processes, grace)
        statuses = sorted({process.returncode for process in processes})
        if not in_time:
            return "cut off", {"reason": "its time was up"}
        if statuses == [ABSENT]:
            return "absent", {}
        if set(statuses) <= {0, ABSENT}:
            return "passed", {}
        return "failed", {"status": statuses}

    def _shorten_log(self) -> None:
        if self.log.stat().st_size > LOG_BYTES:
            text = self.log.read_bytes()
            half = LOG_BYTES // 4
            self.log.write_bytes(text[:half] + b"\n... left out ...\n" + text[-half:])

    def _summarize(self) -> str:
        """Writes the summary of what there is by now, whole or not at all."""
        text = render(last_run(read(self.results.path)))
        new = self.work / "summary.txt"
        new.write_text(text + "\n")
        (self.out / "summary.txt").write_text(new.read_text())
        return text


def path_with_tools() -> str:
    """The PATH, and behind it the folders that CUDA's tools usually are in."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, TOOL_FOLDERS)])


def _wait(processes: Sequence[subprocess.Popen[bytes]], until: float) -> bool:
    """Whether all ended before the monotonic clock said so."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _end(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Interrupts what still runs, waits for it to write what it has, and kills whatever is left of the groups."""
    _signal([process for process in processes if process.poll() is None], signal.SIGINT)
    _wait(processes, time.monotonic() + grace)
    _signal(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            continue


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/gpu_check.py", description="Builds, tests and measures on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-check", help="folder for what is built")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of all stages together")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages to run, beside building")
    parser.add_argument("--old", type=Path, help="sources of a version whose kernels are measured, too")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny tensors and emulated kernels")
    parser.add_argument("--summary", action="store_true", help="only print the summary of the results in --out")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs the command line: 0 if nothing failed, 2 if there is no device."""
    begun = time.monotonic()
    arguments = parse()
    out, work = arguments.out.resolve(), arguments.work.resolve()
    if arguments.summary:
        print(render(last_run(read(out / "results.jsonl"))))
        return 0
    os.environ["PATH"] = path_with_tools()
    shutil.rmtree(work / "running", ignore_errors=True)  # of a run that was killed
    (work / "running").mkdir(parents=True)
    check = Check(out, work, arguments.dry)
    scale = arguments.seconds / TOTAL_SECONDS
    facts = check.facts(FACTS_SECONDS * scale)
    if "error" not in facts and facts["device"] is None:
        print("torch finds no CUDA device here: nothing was built, tested or measured", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    check.results.add("run", dry=arguments.dry, seconds=arguments.seconds, **facts)
    stop_in_order()
    planned = stages(work, (facts.get("device") or {}).get("capability", ""), arguments.dry, arguments.old)
    if arguments.only:
        unknown = set(arguments.only) - {stage.name for stage in planned}
        if unknown:
            names = ", ".join(stage.name for stage in planned)
            raise SystemExit(f"--only: there is no stage {', '.join(sorted(unknown))}; choose from {names}")
        planned = [stage for stage in planned if stage.name in ("build", *arguments.only)]
    return check.run_all(planned, scale, begun + FACTS_SECONDS * scale)


if __name__ == "__main__":
    sys.exit(main())
