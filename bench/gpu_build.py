"""Builds the package for a GPU by CMake alone and puts it together by hand: no pip, no index, no metadata.

    python -m bench.gpu_build --work FOLDER --architectures 90 [--old SOURCES]

The package is then in FOLDER/site, and that of the old sources in FOLDER/site-old, to be compared with.
A dry run takes the compiled core of the installed package instead of compiling one.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_record import Results

ROOT = Path(__file__).resolve().parents[1]
_NO_CACHES = shutil.ignore_patterns("__pycache__", "*.so")


@dataclass(frozen=True)
class Kernels:
    """A version of the package.

    Attributes:
        name: In results, and in the names of folders.
        sources: Where its sources are.
    """

    name: str
    sources: Path

    def site(self, work: Path) -> Path:
        """Where its package is put."""
        return work / ("site" if self.sources == ROOT else f"site-{self.name}")


def versions(old: Path | None) -> list[Kernels]:
    """The present kernels, and those they are compared with, if any."""
    return [Kernels("present", ROOT), *([Kernels("old", old.resolve())] if old is not None else [])]


def assemble(site: Path, sources: Path) -> None:
    """The Python files of the package as setup.py maps them; what an earlier build left is removed."""
    package = site / "fusedopt"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(sources / "fusedopt", package, ignore=_NO_CACHES)
    shutil.copytree(sources / "triton_kernels", package / "triton_kernels", ignore=_NO_CACHES)


def compile_into(site: Path, build: Path, architectures: str, sources: Path) -> None:
    """Configures, builds and installs the compiled modules into the package."""
    import pybind11

    configure = ["cmake", "-S", str(sources), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    if (ninja := shutil.which("ninja")) is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += [f"-DCMAKE_INSTALL_PREFIX={site}", f"-DFUSEDOPT_CUDA_ARCHITECTURES={architectures}"]
    workers = str(len(os.sched_getaffinity(0)))
    for command in (
        configure,
        ["cmake", "--build", str(build), "--parallel", workers],
        ["cmake", "--install", str(build)],
    ):
        print("+", " ".join(command), flush=True)
        subprocess.run(command, check=True)


def copy_compiled(site: Path) -> None:
    """The modules of the installed package, which is anywhere but in the sources."""
    path = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, site)]
    spec = importlib.machinery.PathFinder.find_spec("fusedopt", path)
    if spec is None or spec.origin is None:
        raise SystemExit("fusedopt is not installed, and a dry run compiles nothing")
    for module in Path(spec.origin).parent.glob("_c*.so"):
        shutil.copy2(module, site / "fusedopt")


def main() -> int:
    """Runs the command line; 1 if something was not built."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_build", description="Builds the package by CMake alone.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the package and what is in between")
    parser.add_argument("--architectures", default="", help="compute capabilities, as in 80,90")
    parser.add_argument("--old", type=Path, help="sources of a version to compare with")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    dry = os.environ.get("FUSEDOPT_GPU_DRY", "0") == "1"
    results = Results.of_environment()
    missing = []
    for kernels in versions(arguments.old):
        site, begun = kernels.site(work), time.monotonic()
        fields = {}
        try:
            assemble(site, kernels.sources)
            if dry:
                copy_compiled(site)
            else:
                compile_into(site, work / f"build-{kernels.name}", arguments.architectures, kernels.sources)
                if not any((site / "fusedopt").glob("_cuda*.so")):
                    raise ImportError("there are no CUDA kernels; what CMake said of that is in the log")
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            missing.append(kernels.name)
            fields["error"] = str(error)
        modules = {path.name: path.stat().st_size for path in sorted((site / "fusedopt").glob("*.so"))}
        seconds = round(time.monotonic() - begun, 1)
        results.add("build", kernels=kernels.name, seconds=seconds, modules=modules, **fields)
        print(f"{kernels.name}: {seconds} s, {', '.join(modules) or 'no modules'}", *fields.values(), flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
