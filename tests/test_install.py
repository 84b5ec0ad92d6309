"""Installations as users make them, each in a new environment: from the source distribution, a wheel, and editable.

They compile the core twice, so `make test` leaves them to `make install-check`. What must be there is listed by git.
From the source distribution it is built in isolation, with tools that pip fetches; elsewhere with those at hand.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the source distribution leaves out (MANIFEST.in), and what setuptools makes for it.
UPKEEP = re.compile(r"\.|bench/results/")
MADE = re.compile(r"fusedopt\.egg-info/|PKG-INFO$|setup\.cfg$")
# Where this interpreter's packages are in an environment of its own.
SITE = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)

STEP = """
import fusedopt, fusedopt.triton_kernels, torch
from pathlib import Path

def stepped(**options):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = fusedopt.AdamW([param], state_dtype="8bit", **options)
    param.grad = torch.randn(64, 128)
    optimizer.step()
    return param, optimizer.state[param]

(param, state), (expected, expected_state) = stepped(), stepped(backend="eager")
assert torch.equal(param, expected)
assert state.keys() == expected_state.keys() and "exp_avg_sq_codes" in state
assert all(torch.equal(state[name], expected_state[name]) for name in state)
data = Path(fusedopt.__file__).parent
assert (data / "py.typed").is_file() and (data / "_core.pyi").is_file()
print(fusedopt.__file__, fusedopt.triton_kernels.__file__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that nothing set for these tests reaches; it must succeed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FUSEDOPT_", "MAKE"))}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"  # cmake and ninja
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in listed if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """A clean copy of the sources: where pip puts those that it builds, so that ccache knows their relative paths."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for name in tracked():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        yield folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pip keeps the wheel here that it makes of a source distribution, so it is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, tree, cwd=out)
    (made,) = out.glob("fusedopt-*.tar.gz")
    return made


@pytest.fixture(scope="module")
def from_sdist(sdist: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = new_environment(tmp_path_factory.mktemp("from_sdist"))
    pip(environment, cache, "install", sdist)
    return environment


@pytest.fixture(scope="module")
def wheel(from_sdist: Path, sdist: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that installing the source distribution has made."""
    out = tmp_path_factory.mktemp("wheel")
    pip(from_sdist, cache, "wheel", "--no-deps", "--wheel-dir", out, sdist)
    (made,) = out.glob("*.whl")
    return made


def new_environment(folder: Path) -> Path:
    """One in which everything of this one is at hand, torch above all, except for fusedopt."""
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder)
    environment, shared = folder / "env", folder / "shared"
    shared.mkdir()
    for path in {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}:
        for entry in path.iterdir():
            if "fusedopt" not in entry.name:
                (shared / entry.name).symlink_to(entry)
    # After the environment's own, and not looked at by pip's isolated builds.
    (environment / SITE / "shared.pth").write_text(f"{shared}\n")
    return environment


def pip(environment: Path, cache: Path, *arguments: str | Path, **variables: str) -> None:
    # CUDA kernels would take several times as long, and have tests of their own.
    run(
        *(sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "--cache-dir", cache, *arguments),
        cwd=environment,
        FUSEDOPT_CMAKE_ARGS="-DFUSEDOPT_CUDA=OFF",
        **variables,
    )


def files_after_a_step(environment: Path) -> tuple[Path, Path]:
    """Where the package and its Triton kernels were found, from a directory elsewhere."""
    package, kernels = run(environment / "bin" / "python", "-c", STEP, cwd=Path("/")).splitlines()
    return Path(package), Path(kernels)


def test_the_sources_alone_say_what_to_do(tmp_path: Path) -> None:
    """Imported where they lie, before anything is compiled."""
    shutil.copytree(ROOT / "fusedopt", tmp_path / "fusedopt", ignore=shutil.ignore_patterns("*.so"))
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-c", "import fusedopt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=own)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {tmp_path}/fusedopt holds fusedopt's sources without their compiled core; install them with "
        "`pip install -e .` in the folder above it, or start Python elsewhere to import the fusedopt that is installed"
    )


@pytest.mark.slow
def test_source_distribution_is_the_repository(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in names if not MADE.match(name)} == {name for name in tracked() if not UPKEEP.match(name)}


@pytest.mark.slow
def test_wheel_is_the_packages(wheel: Path) -> None:
    """And the core; nothing that the source distribution has for building it."""
    packages = {name for name in tracked() if name.startswith(("fusedopt/", "triton_kernels/"))}
    expected = {re.sub("^triton_kernels/", "fusedopt/triton_kernels/", name) for name in packages}
    expected.add("fusedopt/_core" + sysconfig.get_config_var("EXT_SUFFIX"))
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


@pytest.mark.slow
def test_install_from_source_distribution(from_sdist: Path) -> None:
    package = from_sdist / SITE / "fusedopt"
    assert files_after_a_step(from_sdist) == (package / "__init__.py", package / "triton_kernels" / "__init__.py")
    assert "CPU kernels" in run(from_sdist / "bin" / "fusedopt", "info", cwd=Path("/"))


@pytest.mark.slow
def test_install_wheel(wheel: Path, cache: Path, tmp_path: Path) -> None:
    environment = new_environment(tmp_path)
    pip(environment, cache, "install", wheel)
    package = environment / SITE / "fusedopt"
    assert files_after_a_step(environment) == (package / "__init__.py", package / "triton_kernels" / "__init__.py")


@pytest.mark.slow
def test_install_editable(tree: Path, cache: Path, tmp_path: Path) -> None:
    environment = new_environment(tmp_path)
    folder = str(tree / "build" / "editable")
    pip(environment, cache, "install", "--no-build-isolation", "--editable", tree, FUSEDOPT_BUILD_DIR=folder)
    found = (tree / "fusedopt" / "__init__.py", tree / "triton_kernels" / "__init__.py")
    assert files_after_a_step(environment) == found
    for path in found:
        with path.open("a") as file:
            file.write("edited = 'as one sees'\n")
    (tree / "fusedopt" / "added.py").write_text("added = True\n")
    code = "import fusedopt.added, fusedopt.triton_kernels as kernels; print(fusedopt.edited, kernels.edited)"
    for folder in (Path("/"), tree):  # in the tree, the sources are what is installed
        assert run(environment / "bin" / "python", "-c", code, cwd=folder) == "as one sees as one sees\n"
