"""Builds the compiled core with CMake; all metadata is in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt lists."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures, builds and installs next to the package.

    FUSEDOPT_CUDA_ARCHITECTURES lists what to compile the CUDA kernels for, as in 80,90. FUSEDOPT_CMAKE_ARGS adds
    arguments to the configure step, quoted as in a shell, and FUSEDOPT_BUILD_DIR moves the build, as `make sanitize`
    does.
    """

    def build_extension(self, ext: Extension) -> None:
        """Runs CMake three times: configure, build, install."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("FUSEDOPT_BUILD_DIR", self.build_temp)).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            # Given anew each time: an isolated build's tools are gone when the next one finds this cache.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
            # Given even if empty: a cache of another build may hold another list.
            f"-DFUSEDOPT_CUDA_ARCHITECTURES={os.environ.get('FUSEDOPT_CUDA_ARCHITECTURES', '')}",
            *shlex.split(os.environ.get("FUSEDOPT_CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


class CleanBuild(build_py):
    """Starts from nothing: setuptools keeps what an earlier build left, and would install modules that are gone."""

    def run(self) -> None:
        """Removes the package that an earlier build made, then builds."""
        shutil.rmtree(Path(self.build_lib) / "fusedopt", ignore_errors=True)
        super().run()


setup(
    ext_modules=[CMakeExtension("fusedopt._core")],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuild},
    packages=[*find_packages(include=["fusedopt", "fusedopt.*"]), "fusedopt.triton_kernels"],
    package_dir={"fusedopt": "fusedopt", "fusedopt.triton_kernels": "triton_kernels"},
    package_data={"fusedopt": ["py.typed", "*.pyi"], "fusedopt.training": ["*.yaml", "presets/*.yaml"]},
)
