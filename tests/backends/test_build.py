"""What is built: no weak symbols in the kernel objects, a quick import, public names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, each_variant, make_params

import fusedopt

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = "fusedopt_isa_"


def built_objects() -> list[Path]:
    """The kernel objects that the package was built of, if what they are made of has not changed since."""
    sources = [ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl", ".cpp"))]
    kernels = [path for path in sources if path.parent.name not in ("csrc", "cuda", "python")]
    changed = max(path.stat().st_mtime for path in kernels)
    objects = sorted((ROOT / "build").glob(f"temp.*/fusedopt._core/CMakeFiles/{OBJECTS}*/**/*.o"))
    return objects if all(path.stat().st_mtime > changed for path in objects) else []


@pytest.fixture(scope="module")
def isa_objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The kernel objects alone: those of the package, or built as they are."""
    if shutil.which("nm") is not None and (found := built_objects()):
        return found
    if shutil.which("cmake") is None or shutil.which("ninja") is None or shutil.which("nm") is None:
        pytest.skip("needs cmake, ninja and nm")
    build = tmp_path_factory.mktemp("isa")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DFUSEDOPT_PYTHON=OFF"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    objects = sorted(build.glob(f"CMakeFiles/{OBJECTS}*/**/*.o"))
    assert len(objects) == len(list(build.glob(f"CMakeFiles/{OBJECTS}*")))
    return objects


def test_kernel_objects_have_no_weak_symbols_and_export_their_table_only(isa_objects: list[Path]) -> None:
    """A weak symbol would let the linker keep one instruction set's copy for all: an illegal instruction."""
    for path in isa_objects:
        lines = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout.splitlines()
        symbols = [re.match(r"[0-9a-f ]{16} (\w) (.*)", line) for line in lines]
        kinds = [(match[1], match[2]) for match in symbols if match]
        assert not [name for kind, name in kinds if kind in "WwVvu"], path.name
        exported = [name for kind, name in kinds if kind.isupper() and kind != "U"]
        assert len(exported) == 1, exported
        assert re.fullmatch(r"fusedopt::k\w+Kernels", exported[0])


def test_instruction_sets_differ(isa_objects: list[Path]) -> None:
    """Each object really is compiled for its own: the wide ones use wide registers, the baseline does not."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    registers = {}
    for path in isa_objects:
        listing = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
        registers[path.name] = {name for name in ("xmm", "ymm", "zmm") if f"%{name}" in listing}
    expected = {"isa_baseline": {"xmm"}, "isa_v3": {"xmm", "ymm"}, "isa_v4": {"xmm", "ymm", "zmm"}}
    for name, found in registers.items():
        stem = name.split(".")[0]
        if stem in expected:
            assert found <= expected[stem]
            assert max(found) == max(expected[stem])


def test_import_is_quick() -> None:
    """Under 0.15 s of the processor's time beyond torch; best of several processes, since others may run beside it.

    Python goes through all objects, which are torch's, when enough new ones were made, be that in our import or later:
    as long as all of our import takes.
    """
    code = (
        "import gc, time, torch; gc.disable(); t = time.process_time(); import fusedopt; print(time.process_time() - t)"
    )

    def seconds() -> float:
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/")
        return float(output.stdout)

    assert any(seconds() < 0.15 for _ in range(5))


def test_import_does_not_load_what_few_need() -> None:
    code = "import sys, torch; before = set(sys.modules); import fusedopt; print(*sorted(set(sys.modules) - before))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    loaded = [name for name in output.split() if not name.startswith("fusedopt")]
    assert not [name for name in loaded if name.split(".")[0] in ("torch", "numpy", "triton", "transformers")], loaded


def test_core_links_no_torch() -> None:
    if shutil.which("ldd") is None:
        pytest.skip("needs ldd")
    linked = subprocess.run(["ldd", fusedopt._core.__file__], check=True, capture_output=True, text=True).stdout
    assert "torch" not in linked


def test_tests_run_against_the_installed_package() -> None:
    """Not the source tree, which python -m pytest would put first on the path."""
    installed = Path(fusedopt.__file__).resolve()
    if "site-packages" not in installed.parts:
        pytest.skip("an editable or in-tree build")
    assert ROOT not in installed.parents or "site-packages" in installed.parts


def test_every_compiled_rule_has_its_reference_and_its_states() -> None:
    rules = fusedopt._core.rules()
    assert rules.keys() == fusedopt.backends.base.REFERENCES.keys()
    declared = {spec.name for cls in _subclasses(fusedopt.FusedOptimizer) for spec in cls.STATES}
    assert {name for names in rules.values() for name in names} == declared
    for case, kwargs in (row.values for row in each_variant()):
        optimizer = case.ours(make_params([(2, 2)], torch.float32), **kwargs)
        (group,) = optimizer.param_groups
        assert rules[optimizer.rule(group)] == tuple(spec.name for spec in optimizer.states(group))
    tested = {case.ours for case in CASES}
    untested = {cls for cls in _subclasses(fusedopt.FusedOptimizer) if cls.STATES} - tested
    assert untested == {fusedopt.AnyPrecisionAdamW, fusedopt.Adafactor}  # which have tests of their own


def _subclasses(cls: type) -> set[type]:
    """Those of this package; Lightning makes others."""
    ours = (sub for sub in cls.__subclasses__() if sub.__module__.startswith("fusedopt."))
    return {cls}.union(*(_subclasses(sub) for sub in ours))


def test_public_names_are_documented() -> None:
    for name in fusedopt.__all__:
        value = getattr(fusedopt, name)
        assert isinstance(value, str) or (value.__doc__ and len(value.__doc__) > 40), name


def test_no_optimizers_name_outside_its_rooms() -> None:
    """An optimizer's name in a file about storage, launching or checkpoints is a change in the wrong room."""
    own = {"csrc/rules/all.h", "fusedopt/__init__.py", "fusedopt/optimizers/__init__.py", "triton_kernels/rules.py"}
    # What others call them: names of transformers' optimizers and schedules.
    own |= {"fusedopt/optimizers/names.py", "fusedopt/schedules/functions.py"}
    optimizers = {path.stem for path in (ROOT / "fusedopt/optimizers").glob("*.py")} - {"__init__", "names"}
    assert len(optimizers) > 5
    for stem in optimizers:
        own |= {f"csrc/rules/{stem}.h", f"fusedopt/optimizers/{stem}.py", f"fusedopt/reference/{stem}.py"}
        own.add(f"triton_kernels/{stem}.py")
    stems = "|".join(["adam", *optimizers])
    files = [
        path
        for folder in ("csrc", "fusedopt", "triton_kernels")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".inl", ".cu", ".cuh")
    ]
    assert len(files) > 20
    # Integrations are for one framework each, and name optimizers as it does; whoever advises names what is advised.
    rooms = {ROOT / "fusedopt/integrations", ROOT / "fusedopt/training"}
    files = [path for path in files if not rooms & set(path.parents)]
    named = [str(path.relative_to(ROOT)) for path in files if re.search(rf"\b({stems})", path.read_text(), re.I)]
    assert set(named) <= own
