"""The repository checks itself: who imports whom, that every op has its reference, that every kernel compiles."""

import ast
import doctest
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import compile_checks
import pytest
from compile_checks import (
    compilation_key,
    float_atomics_in,
    in_threads,
    included_text,
    instances_by_file,
    ptx_of,
    share,
    spill_bytes,
    to_compile,
    to_compile_to_ptx,
)
from conftest import ROOT, digest_of, needs_cupy, receipt_state, source_digests

import cupyq
from cupyq import _kernels
from cupyq._device import TARGET_ARCHS

sys.path.insert(0, str(ROOT / "tools"))
from cuda_extra import cuda_extra  # noqa: E402

PACKAGE = ROOT / "cupyq"
KERNELS = PACKAGE / "cu"

# --- who imports whom -------------------------------------------------------------------------------------------------

# An import may point to a module of the same or a lower number, never up, and never in a circle.
LAYERS = {
    "errors": 0,
    "_fork": 0,
    "_recording": 0,
    "_arguments": 0,
    "_capsules": 0,
    "_copies": 0,
    "_version": 0,
    "_json_file": 1,
    "_arrays": 1,
    "_device": 1,
    "_progress": 1,
    "formats": 1,
    "_launch": 1,
    "_replay": 2,
    "_foreign": 2,
    "interop": 2,
    "_tensor_maps": 2,
    "_kernels": 2,
    "ops": 3,
    "layers": 4,
    "models": 5,
    "tp": 5,
    "generate": 6,
    "quantize": 6,
    "serve": 7,
    "doctor": 7,
    "bench": 7,
    "ext": 7,
    "cli": 7,
    "__main__": 7,
}


def module_names():
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")
    )


def imports_of(name, source, known):
    """The cupyq modules that a module's source imports anywhere, functions included."""
    package = name if (ROOT / name.replace(".", "/") / "__init__.py").exists() else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import module` names a module, `from module import function` does not.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {found_name for found_name in found if found_name.partition(".")[0] == "cupyq"}


@cache
def import_graph():
    known = set(module_names())
    graph = {}
    for name in known:
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        graph[name] = imports_of(name, path.read_text(), known)
    return graph


def layer(name):
    return max(LAYERS.values()) - 0.5 if name == "cupyq" else LAYERS[name.split(".")[1]]


def upward_arrows(graph):
    """Imports that point up, as text. cupyq/__init__.py hands out names of every layer: it ranks below the top."""
    arrows = []
    for name, targets in graph.items():
        if name == "cupyq":
            continue
        arrows += [f"{name} imports {t}" for t in sorted(targets) if layer(t) > layer(name)]
    return arrows


def test_every_module_has_a_layer():
    assert {name.split(".")[1] for name in module_names() if name != "cupyq"} <= LAYERS.keys()


def test_imports_never_point_up():
    assert upward_arrows(import_graph()) == []


def test_an_upward_import_would_be_seen():
    known = set(module_names())
    wrong = {
        "import cupyq.ops.norm": "cupyq.formats.exl2",
        "from cupyq.ops import norm": "cupyq._kernels",
        "from cupyq.ops.norm import rms_norm": "cupyq.formats.exl2",
        "from ..layers import linear": "cupyq.ops.norm",
        "def late():\n    from .. import _kernels": "cupyq.formats.exl2",
        "import cupyq": "cupyq.ops.norm",
    }
    for source, name in wrong.items():
        assert upward_arrows({name: imports_of(name, source, known)}), source
    assert not upward_arrows({"cupyq.ops.norm": imports_of("cupyq.ops.norm", "from cupyq import _kernels", known)})


def test_imports_have_no_circle():
    graph = import_graph()
    done = set()

    def visit(name, trail):
        assert name not in trail, " imports ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph.get(name, ()) - {"cupyq"}):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


def test_cupy_is_imported_late_and_in_one_place():
    """Only _arrays.require_cupy() imports CuPy, so that one message explains its absence; torch and JAX, nobody."""
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            importers |= {(name.split(".")[0], path.relative_to(PACKAGE).as_posix()) for name in names}
    assert {(name, path) for name, path in importers if name in ("torch", "jax", "jaxlib", "tensorflow")} == set()
    # _kernels imports cupy.cuda.nvrtc, after require_cupy(); the doctor looks at what is wrong with CuPy.
    allowed = {"_arrays.py", "_kernels.py", "doctor.py"}
    assert {path for name, path in importers if name in ("cupy", "cupyx", "cupy_backends")} <= allowed


def private_names_of_kernels(source):
    """Names with an underscore that a source text takes out of cupyq._kernels."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("_kernels", "cupyq._kernels"):
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module in ("_kernels", "cupyq._kernels"):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.startswith("_")]


def test_what_kernels_keep_to_themselves_is_used_by_tests_alone():
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    private = {path.relative_to(ROOT).as_posix(): private_names_of_kernels(path.read_text()) for path in sources}
    assert {path: names for path, names in private.items() if names} == {}
    for source in ("_kernels._a(1)", "x = cupyq._kernels._a", "def late():\n    from cupyq._kernels import b, _a"):
        assert private_names_of_kernels(source) == ["_a"]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_cupyq_touches_no_device_and_needs_no_cupy():
    modules = ", ".join(name for name in module_names() if name != "cupyq.__main__")
    code = f"""
import sys
sys.modules["cupy"] = None  # importing it now raises ImportError
import {modules}
import numpy as np
from cupyq.ops.norm import rms_norm
print(rms_norm(np.array([[3, 4]], np.float32), np.ones(2, np.float32), eps=0.0).tolist())
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "[[0.848" in result.stdout
    result = run_python("import sys, cupyq; print('cupy' in sys.modules, 'torch' in sys.modules, 'jax' in sys.modules)")
    assert result.stdout.split() == ["False"] * 3, result.stderr


# --- ops --------------------------------------------------------------------------------------------------------------

# Public ops whose reference is not a function of the same name, each with its reason.
REFERENCE_ELSEWHERE: dict[str, str] = {}


def public_ops():
    """[(module name, function name)] of the functions decorated with accepts_dlpack."""
    found = []
    for path in sorted((PACKAGE / "ops").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
                if any(isinstance(d, ast.Name) and d.id == "accepts_dlpack" for d in decorators):
                    found.append((f"cupyq.ops.{path.stem}", node.name))
    return found


def test_ops_are_found():
    assert {"rms_norm", "layer_norm"} <= {name for _, name in public_ops()}


@pytest.mark.parametrize(("module", "name"), public_ops())
def test_every_op_has_a_reference_and_a_docstring(module, name):
    module = importlib.import_module(module)
    op = getattr(module, name)
    assert name in REFERENCE_ELSEWHERE or callable(getattr(module, f"{name}_reference", None))
    assert op.__doc__ and len(op.__doc__.strip().splitlines()) >= 3
    arguments = inspect.signature(op).parameters
    assert [p for p in arguments if p not in ("out", "workspace") and not re.search(rf"\b{p}\b", op.__doc__)] == []


def test_every_op_is_watched_by_the_sanitizer():
    cases = (ROOT / "tools/sanitize_cases.py").read_text()
    assert [name for _, name in public_ops() if f"ops.{name}(" not in cases] == []


def doctests(name):
    """The docstrings of a module that hold examples."""
    finder = doctest.DocTestFinder()
    module = importlib.import_module(name)
    tests = {test.name: test for test in finder.find(module, name)}
    # The finder passes over decorated functions, as the decorator's module is another one.
    for key, value in vars(module).items():
        inner = inspect.unwrap(value) if callable(value) and hasattr(value, "__wrapped__") else None
        if inner is not None and inner.__module__ == name:
            tests |= {test.name: test for test in finder.find(inner, f"{name}.{key}", module)}
    return {key: test for key, test in tests.items() if test.examples}


@pytest.mark.parametrize("name", [name for name in module_names() if name != "cupyq.__main__"])
def test_examples_in_docstrings(name):
    for key, test in doctests(name).items():
        report: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert not result.failed, f"{key}: {''.join(report)}"


def test_decorated_ops_are_among_the_doctests():
    assert "cupyq.ops.norm.rms_norm" in doctests("cupyq.ops.norm")


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernel_files():
    return sorted(KERNELS.glob("*.cu"))


def kernels_in(text):
    """Names of the __global__ functions of a source text."""
    found = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^{;]*?\)\s*)?(\w+)\s*\(", without_comments(text))
    assert len(found) == without_comments(text).count("__global__")
    return found


def without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("file", [path.stem for path in kernel_files()])
@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_every_instance_compiles_without_spilling(arch, file, request, record_property):
    """Without a GPU: all instances, or a share where the receipt says that all were compiled as they are now. What a
    compilation gave is kept in the cache of pytest until its text changes. With another compiler than the receipt's all
    compile, and what spills is a warning."""
    needs_cupy()
    if not compile_checks.is_receipted(file):
        record_property("not in the receipt", f"{file}.cu")
    cache = getattr(request.config, "cache", None)
    instances = {compilation_key(i, arch): i for i in to_compile(file, arch)}
    known = cache.get(f"cupyq/spills-{arch}-{file}", {}) if cache else {}
    missing = [key for key in instances if key not in known]
    spills = known | dict(zip(missing, in_threads(lambda key: spill_bytes(instances[key], arch), missing), strict=True))
    spills = {key: spills[key] for key in instances}
    if cache:
        cache.set(f"cupyq/spills-{arch}-{file}", spills)
    spilling = {str(instances[key]): count for key, count in spills.items() if count}
    if spilling and not compile_checks.is_receipted_compiler():
        warnings.warn(f"NVRTC {compile_checks.nvrtc_version()} spills on {arch}, bytes of a thread: {spilling}", stacklevel=1)
    else:
        assert spilling == {}
    assert spills


@pytest.mark.parametrize("version, is_strict", [("its own", True), ("99.0", False)])
def test_the_compiler_of_the_receipt_may_not_spill(version, is_strict, tmp_path):
    needs_cupy()
    receipt = tmp_path / "receipt.json"
    receipt.write_text(json.dumps({"nvrtc": compile_checks.nvrtc_version() if is_strict else version}))
    assert compile_checks.is_receipted_compiler(receipt) == is_strict


def test_no_kernel_adds_floats_atomically():
    """Read off the compiled text, as atomicAdd is legal on integers."""
    needs_cupy()
    suspects = to_compile_to_ptx()
    texts = in_threads(ptx_of, suspects)
    assert {str(i): float_atomics_in(text) for i, text in zip(suspects, texts, strict=True) if float_atomics_in(text)} == {}
    assert all(".target sm_" in text for text in texts)


def test_a_share_has_every_instance_and_every_kernel_for_every_target():
    for file, instances in instances_by_file().items():
        shares = [share(instances, arch) for arch in TARGET_ARCHS]
        assert set().union(*shares) == set(instances), file
        kernels = {i.expression.split("<")[0] for i in instances}
        assert [{i.expression.split("<")[0] for i in chosen} for chosen in shares] == [kernels] * len(TARGET_ARCHS)
    assert len(share([_kernels.instance("a", i) for i in range(20)], "sm_80")) == 3


@pytest.mark.parametrize("name", ["cu/rms_norm.cu", "cu/norm.cuh", "instances", "archs", "options", "nvrtc", "checks", "entry"])
def test_the_compile_receipt_covers_only_what_was_compiled(name, monkeypatch):
    """Whatever a compilation depends on: once it changes, all instances of the file are compiled again."""
    needs_cupy()
    file, (texts, digest) = "rms_norm", _kernels._sources()
    is_receipted = compile_checks.is_receipted.__wrapped__
    entries = {file: compile_checks.digest_of_file(file)}
    monkeypatch.setattr(compile_checks, "receipted_digests", lambda: entries)
    monkeypatch.setattr(compile_checks, "is_receipted", is_receipted)
    listed = instances_by_file()[file]
    assert is_receipted(file) and len(to_compile(file, "sm_80")) < len(listed)
    if name.startswith("cu/"):
        changed = {name.removeprefix("cu/"): texts[name.removeprefix("cu/")] + " "}
        monkeypatch.setattr(_kernels, "_sources", lambda: (texts | changed, digest))
    elif name == "instances":
        listed = [*listed, listed[0]._replace(expression="rms_norm<more>")]
        monkeypatch.setattr(compile_checks, "instances_by_file", lambda: {file: listed})
    elif name == "archs":
        monkeypatch.setattr(compile_checks, "TARGET_ARCHS", (*TARGET_ARCHS, "sm_121"))
    elif name == "options":
        monkeypatch.setattr(_kernels, "OPTIONS", (*_kernels.OPTIONS, "--use_fast_math"))
    elif name == "nvrtc":
        monkeypatch.setattr(_kernels, "load_nvrtc", lambda: SimpleNamespace(getVersion=lambda: (99, 0)))
    elif name == "checks":
        monkeypatch.setattr(compile_checks, "_text_of_checks", lambda: "others")
    else:
        entries.clear()
    assert not is_receipted(file) and to_compile(file, "sm_80") == listed


def test_the_compile_receipt_names_what_was_compiled_without_fault(tmp_path, monkeypatch):
    needs_cupy()
    digests = {file: compile_checks.digest_of_file(file) for file in ("softcap", "group_rows")}
    listed = {file: instances_by_file()[file] for file in digests}
    pairs = {file: {(i, arch) for i in listed[file] for arch in TARGET_ARCHS} for file in digests}
    receipt, asked, spilling = tmp_path / "receipt.json", set(), []

    def spills(instance, arch):
        asked.add((instance, arch))
        return 8 * (instance.file in spilling and arch == "sm_120")

    noted = partial(compile_checks.receipted_digests.__wrapped__, receipt)
    monkeypatch.setattr(compile_checks, "instances_by_file", lambda: listed)
    monkeypatch.setattr(compile_checks, "digest_of_file", digests.get)
    monkeypatch.setattr(compile_checks, "receipted_digests", noted)
    monkeypatch.setattr(compile_checks, "is_receipted", compile_checks.is_receipted.__wrapped__)
    monkeypatch.setattr(compile_checks, "RECEIPT", receipt)
    monkeypatch.setattr(compile_checks, "spill_bytes", spills)
    monkeypatch.setattr(compile_checks, "ptx_of", lambda instance: "red.global.add.f32 [%rd1], %f2;")
    spilling.append("softcap")
    with pytest.raises(SystemExit, match="spills 8 bytes on sm_120"):
        compile_checks.write_receipt()
    assert noted() == {} and asked == pairs["softcap"]
    spilling.clear()
    with pytest.raises(SystemExit, match="adds floats atomically"):  # group_rows has atomics, of integers
        compile_checks.write_receipt()
    assert noted() == {"softcap": digests["softcap"]}
    asked.clear()
    monkeypatch.setattr(compile_checks, "ptx_of", lambda instance: "atom.global.add.u32 %r1, [%rd1], 1;")
    compile_checks.write_receipt()
    assert noted() == digests and asked == pairs["group_rows"]


def test_texts_of_all_headers_are_part_of_a_kernel():
    assert "rms_norm(" in included_text("rms_norm.cu") and (KERNELS / "norm.cuh").read_text() in included_text("rms_norm.cu")


def test_float_atomics_would_be_seen():
    for line in (
        "atom.global.add.f32 %f1, [%rd1], %f2;",
        "red.global.add.f32 [%rd1], %f2;",
        "red.add.noftz.bf16x2 [a], b;",
    ):
        assert float_atomics_in(line), line
    for line in ("atom.global.add.u32 %r1, [%rd1], 1;", "red.shared.add.s32 [%rd1], %r1;", "add.f32 %f1, %f2, %f3;"):
        assert not float_atomics_in(line), line


def test_every_kernel_has_a_listed_instance():
    listed = {(file, i.expression.split("<")[0]) for file, instances in instances_by_file().items() for i in instances}
    written = {(path.stem, kernel) for path in kernel_files() for kernel in kernels_in(path.read_text())}
    assert written - listed == set()
    assert listed - written == set()


def test_the_readme_of_cu_lists_every_kernel():
    """Rows `| file | kernels | ops |`: the files and kernels are all there, and nothing else is; the ops exist."""
    rows = re.findall(r"^\| `(\w+\.cuh?)` \| (.*?)\| (.*?) \|$", (KERNELS / "README.md").read_text(), re.MULTILINE)
    listed = {file: set(re.findall(r"`(\w+)`", kernels)) for file, kernels, _ in rows}
    sources = sorted(KERNELS.glob("*.cu*"))
    assert listed == {p.name: set(kernels_in(p.read_text())) if p.suffix == ".cu" else set() for p in sources}
    for file, _, ops in rows:
        for reference in re.findall(r"`(ops\.[\w.]+)`", ops):
            module, _, name = reference.rpartition(".")
            assert hasattr(importlib.import_module(f"cupyq.{module}"), name), f"{file}: {reference}"


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.name)
def test_a_kernel_file_opens_with_what_it_computes(path):
    head = path.read_text().split("\n#include")[0]
    assert head.startswith("// ")
    for word in ("Numerics", "Limits", "Traffic", "Reference"):
        assert f"// {word}" in head, f"{path.name} does not say: {word}"
    for file, name in re.findall(r"(cupyq/[\w/]+\.py): (\w+)", head):
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}: {name}"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.cu*")), ids=lambda path: path.name)
def test_device_code_keeps_its_rules(path):
    code = without_comments(path.read_text())
    for line in re.findall(r"^\s*#\s*include.*$", code, re.MULTILINE):
        name = re.fullmatch(r'#include "(\w+\.cuh)"', line.strip())
        assert name, f"{line}: kernels include files of cu/ only, NVRTC is given no include folder"
        assert (KERNELS / name[1]).exists(), line
    assert "std::" not in code
    assert "assert(" not in code.replace("static_assert(", "")


# --- Python rules -----------------------------------------------------------------------------------------------------

# Modules over 500 lines, each with its reason.
LONG_FILES: dict[str, str] = {}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_python_code_keeps_its_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    # `python -O` removes them.
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "assert as a check"
    assert path.relative_to(PACKAGE).as_posix() in LONG_FILES or len(text.splitlines()) <= 500
    if path.name != "__init__.py" or text.strip():
        assert ast.get_docstring(tree), "no docstring says what the module owns"
    names_raw_module = any(isinstance(node, ast.Attribute) and node.attr == "RawModule" for node in ast.walk(tree))
    assert names_raw_module == (path.name == "_kernels.py")


def test_no_stray_words():
    words = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    sources = (p for folder in (PACKAGE, ROOT / "tests") for p in folder.rglob("*") if p.suffix in (".py", ".cu", ".cuh"))
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


def test_every_test_file_has_something_to_test():
    """test_<name>.py belongs to a module, a kernel or a folder of the package, or to more than one, as those named here.

    Modules whose names say little outside of their folder have it before them, as test_<folder>_<module>.py.
    """
    stems = {path.stem.lstrip("_") for path in PACKAGE.rglob("*")}
    folders = [PACKAGE / name for name in ("ext", "quantize", "bench", "tp")]
    stems |= {f"{folder.name}_{path.stem.lstrip('_')}" for folder in folders for path in folder.glob("*.py")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    of_several = {"repo", "docs", "examples", "golden", "blocks", "fuzz", "ext_hostile", "qmatmul_before"}
    of_several |= {"quantize_architectures", "isolation", "sanitize", "soak", "other_nvrtc", "tp_serve"}
    assert tests - stems - of_several == set()


# --- packaging --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_kernels(tmp_path):
    """Build it as an installer would, offline, from a copy of the tracked kinds of files."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "examples", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    built = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    package = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.suffix in (".py", ".cu", ".cuh")}
    assert package | {"cupyq/cu/README.md"} == {name for name in files if name.startswith("cupyq/")}
    assert any(name.endswith("licenses/LICENSE") for name in files)
    # Nothing else: no tests, no documentation.
    assert {name.partition("/")[0] for name in files} == {"cupyq", f"cupyq-{cupyq.__version__}.dist-info"}


@pytest.mark.parametrize(
    ("version", "status", "extra"),
    [
        (11080, 0, ""),
        (12000, 0, "cuda12"),
        (12090, 0, "cuda12"),
        (13000, 0, "cuda13"),
        (14010, 0, "cuda13"),
        (13000, 3, ""),
    ],
)
def test_the_cuda_extra_follows_the_driver(monkeypatch, version, status, extra):
    class Driver:
        def __init__(self, library):
            pass

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = version
            return status

    monkeypatch.setattr("cuda_extra.ctypes.CDLL", Driver)
    assert cuda_extra() == extra


def test_without_a_driver_there_is_no_cuda_extra():
    assert cuda_extra("libabsent.so.1") == ""


# --- the receipt ------------------------------------------------------------------------------------------------------


def fake_tree(root):
    for name, text in {"cupyq/a.py": "1", "cupyq/cu/b.cu": "2", "cupyq/cu/c.cuh": "3", "tests/test_a.py": "4"}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def write_fake_receipt(root):
    digests = source_digests(root)
    counts = {"passed": 7, "failed": 0, "skipped": 0}
    run = {"tests": "all", "gpus": ["GPU"], "date": "2026-01-02", "counts": counts}
    some = {"tests": ["tests/test_a.py"], "gpus": ["Big", "Big", "GPU"], "date": "2026-01-03", "counts": counts}
    record = {"digest": digest_of(digests), "runs": [run, some], "files": digests}
    receipt = root / "tests/gpu_receipt.json"
    receipt.write_text(json.dumps(record))
    return receipt


def test_the_receipt_notices_every_source_change(tmp_path):
    root = fake_tree(tmp_path)
    assert "missing" in receipt_state(root / "tests/gpu_receipt.json", root)
    receipt = write_fake_receipt(root)
    runs = "1 x GPU, 2026-01-02, 7 passed; 2 x Big, 1 x GPU, 2026-01-03, 7 passed of 1 files"
    assert f"matches the sources ({runs})" in receipt_state(receipt, root)
    for name in source_digests(root):
        path = root / name
        text = path.read_text()
        path.write_text(text + " ")
        assert "differs" in receipt_state(receipt, root) and name in receipt_state(receipt, root)
        path.write_text(text)
    (root / "cupyq/new.cuh").write_text("")
    assert "differs" in receipt_state(receipt, root) and "cupyq/new.cuh" in receipt_state(receipt, root)
    (root / "cupyq/new.cuh").unlink()
    (root / "cupyq/notes.md").write_text("not a source")
    assert "matches" in receipt_state(receipt, root)


FAKE_CUPY = """
from types import SimpleNamespace

__version__ = "0"
ndarray = type("ndarray", (), {})
runtime = SimpleNamespace(
    getDeviceCount=lambda: 1,
    getDeviceProperties=lambda device: {"name": b"Fake GPU"},
    driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 12090,
)
cuda = SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)))
pool = SimpleNamespace(free_all_blocks=lambda: None)
get_default_memory_pool = get_default_pinned_memory_pool = lambda: pool
"""

TWO_GPU_TESTS = """
import pytest

@pytest.mark.gpu
def test_one(cupy):
    pass

@pytest.mark.gpu
def test_two():
    pass

def test_three():
    pass
"""


@pytest.fixture
def run_pytest(tmp_path):
    """run(*options, cupy=text of a stand-in for CuPy) -> the finished run of two gpu tests and another in tests/."""
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tests)
    (tests / "test_two.py").write_text(TWO_GPU_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")

    def run(*options, cupy):
        (tmp_path / "cupy.py").write_text(cupy)
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes three times as long as the tests
        plugins = ("-p", "xdist.plugin") if "-n" in options else ()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugins, "-q", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_a_gpu_test_fails_where_a_gpu_is_required_and_missing(run_pytest, tmp_path):
    no_cupy = "raise ModuleNotFoundError('kept away', name='cupy')"
    result = run_pytest(cupy=no_cupy)
    assert result.returncode == 0 and "1 passed, 2 skipped" in result.stdout
    assert "gpu_receipt.json: missing" in result.stdout
    result = run_pytest("--require-gpu", "--gpu-receipt", "tests/gpu_receipt.json", cupy=no_cupy)
    assert result.returncode == 1 and "no GPU is usable here" in result.stdout and "1 passed, 2 errors" in result.stdout
    assert "no receipt written: there is no GPU" in result.stdout
    assert not (tmp_path / "tests/gpu_receipt.json").exists()


@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_a_run_on_a_gpu_leaves_a_receipt(run_pytest, tmp_path, processes):
    options = ("-m", "gpu", "--require-gpu", "--gpu-receipt", "tests/gpu_receipt.json", *processes)
    result = run_pytest(*options, cupy=FAKE_CUPY)
    assert result.returncode == 0 and "receipt written" in result.stdout, result.stdout
    assert "gpu_receipt.json: matches the sources (1 x Fake GPU" in result.stdout
    receipt = json.loads((tmp_path / "tests/gpu_receipt.json").read_text())
    (run,) = receipt["runs"]
    assert run["tests"] == "all" and run["counts"] == {"passed": 2, "failed": 0, "skipped": 0}
    assert run["gpus"] == ["Fake GPU"] and run["nvrtc"] == "12.9"
    assert (run["cuda_of_driver"], run["cuda_of_runtime"]) == ("13.0", "12.9")
    assert receipt["files"] == source_digests(tmp_path) and receipt["digest"] == digest_of(receipt["files"])
    assert "matches" in run_pytest(cupy=FAKE_CUPY).stdout


def test_a_run_of_some_tests_adds_to_the_receipt_of_the_same_sources(run_pytest, tmp_path):
    receipt = tmp_path / "tests/gpu_receipt.json"
    options = ("-m", "gpu", "--require-gpu", "--gpu-receipt", "tests/gpu_receipt.json")
    run_pytest(*options, cupy=FAKE_CUPY)
    (whole,) = json.loads(receipt.read_text())["runs"]
    two = FAKE_CUPY.replace("lambda: 1,", "lambda: 2,")
    for _ in range(2):  # a second time in its place
        assert "receipt written" in run_pytest(*options, "tests/test_two.py", cupy=two).stdout
        first, other = json.loads(receipt.read_text())["runs"]
        assert first == whole and other["tests"] == ["tests/test_two.py"] and other["gpus"] == ["Fake GPU"] * 2
    (tmp_path / "tests/test_more.py").write_text("")
    before = receipt.read_text()
    assert "no receipt written: only a part of tests/" in run_pytest(*options, "tests/test_two.py", cupy=two).stdout
    assert receipt.read_text() == before
    run_pytest(*options, cupy=two)
    (whole,) = json.loads(receipt.read_text())["runs"]
    assert whole["tests"] == "all" and len(whole["gpus"]) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("-k", "one"), "1 of 2 gpu tests ran"),
        (("-m", "not gpu"), "0 of 2 gpu tests ran"),
        (("tests/test_two.py",), "only a part of tests/ was run"),
        (("-k", "one", "-n", "2"), "1 of 2 gpu tests ran"),
        (("-m", "nothing"), "not everything passed"),
    ],
)
def test_a_partial_run_leaves_no_receipt(run_pytest, tmp_path, options, reason):
    result = run_pytest("--gpu-receipt", "tests/gpu_receipt.json", *options, cupy=FAKE_CUPY)
    assert f"no receipt written: {reason}" in result.stdout
    assert not (tmp_path / "tests/gpu_receipt.json").exists()


def test_a_failed_run_leaves_no_receipt(run_pytest, tmp_path):
    (tmp_path / "tests/test_failing.py").write_text("def test_failing():\n    raise AssertionError\n")
    result = run_pytest("--gpu-receipt", "tests/gpu_receipt.json", cupy=FAKE_CUPY)
    assert "no receipt written: not everything passed" in result.stdout


def test_the_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = f"import os; os.chdir({str(ROOT)!r})\n{example}\nprint(logits.shape, y)"
    result = run_python(code)
    assert result.returncode == 0 and result.stdout.startswith("(1, 3, "), result.stderr


def test_public_names_resolve():
    for name in cupyq.__all__:
        assert getattr(cupyq, name) is not None
