"""What every kernel instance must compile to, and the receipt of the last time that all of them were compiled for all targets.

Compiling takes minutes. `python tests/compile_checks.py` does it for every file of cu/ that changed since it last ran, and
writes compile_receipt.json: a digest of all that a file's compilations depend on. Where a digest still matches, the tests
compile a share again (see `share`); where it does not, everything.
"""

import functools
import hashlib
import inspect
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECEIPT = ROOT / "tests/compile_receipt.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from compile_table import compile_and_read_log, listed_instances  # noqa: E402

from cupyq import _kernels  # noqa: E402
from cupyq._device import TARGET_ARCHS  # noqa: E402


@functools.cache
def instances_by_file():
    """{stem of a .cu file: its listed instances}, both sorted."""
    instances = listed_instances()
    return {file: [i for i in instances if i.file == file] for file in sorted({i.file for i in instances})}


def included_text(name):
    """A file of cu/ and, behind it, the headers it includes."""
    text = _kernels._sources()[0][name]
    return text + "".join(included_text(header) for header in re.findall(r'#include "(\w+\.cuh)"', text))


# --- what is checked --------------------------------------------------------------------------------------------------


def spill_bytes(instance, arch):
    """What ptxas reports of registers that it keeps in memory; raises where the instance does not compile."""
    return compile_and_read_log(instance, arch).spill_bytes


def may_add_floats_atomically(file):
    return re.search(r"atomicAdd|\batom\.|\bred\.", included_text(f"{file}.cu")) is not None


def ptx_of(instance):
    """Compiled to text: an architecture that NVRTC does not know becomes PTX of its newest."""
    return _kernels.compile_instance(instance, "sm_999")[0].decode()


def float_atomics_in(ptx):
    """Atomic additions of floats in a PTX text: they add in the order of arrival, so other bits on every run."""
    return re.findall(r"\b(?:atom|red)\.[\w.:]*add[\w.:]*\.b?f(?:16|32|64)\S*", ptx)


def in_threads(function, *arguments):
    """list(map(function, *arguments)); NVRTC compiles in as many threads as there are."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *arguments))


def compilation_key(instance, arch):
    """Everything the result of a compilation depends on."""
    version = _kernels.load_nvrtc().getVersion()
    parts = (included_text(f"{instance.file}.cu"), instance.expression, arch, str(_kernels.OPTIONS), str(version))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# --- how much of it ---------------------------------------------------------------------------------------------------


def share(instances, arch):
    """Of a file's instances those that are always compiled for `arch`: over all targets, every instance at least once; for
    every target, at least one instance of every kernel."""
    chosen, target = [], TARGET_ARCHS.index(arch)
    kernels: dict[str, list] = {}
    for instance in instances:
        kernels.setdefault(instance.expression.split("<")[0], []).append(instance)
    for of_kernel in kernels.values():
        step = min(len(of_kernel), len(TARGET_ARCHS))
        chosen += of_kernel[target % step :: step]
    return chosen


def to_compile(file, arch):
    """The instances of a file that a test run has to compile for `arch`."""
    instances = instances_by_file()[file]
    return share(instances, arch) if is_receipted(file) else instances


def to_compile_to_ptx():
    """The instances whose text a test run has to search for atomic additions: where all were, one of each kernel's."""
    suspects = [file for file in instances_by_file() if may_add_floats_atomically(file)]
    return [i for file in suspects for i in to_compile(file, TARGET_ARCHS[0])]


# --- the receipt ------------------------------------------------------------------------------------------------------


@functools.cache
def receipted_digests(receipt=RECEIPT):
    return json.loads(receipt.read_text())["files"] if receipt.exists() else {}


@functools.cache
def _text_of_checks():
    checks = (spill_bytes, compile_and_read_log, may_add_floats_atomically, ptx_of, float_atomics_in, compilation_key)
    return "".join(map(inspect.getsource, checks))


def nvrtc_version():
    return ".".join(map(str, _kernels.load_nvrtc().getVersion()))


@functools.cache
def is_receipted_compiler(receipt=RECEIPT):
    """Whether NVRTC is the one that kernels are held to not spilling with. Others, newer ones too, spill here and there."""
    return json.loads(receipt.read_text())["nvrtc"] == nvrtc_version()


def digest_of_file(file):
    """Of the keys of all its compilations, and of what is asked of them."""
    keys = (compilation_key(i, arch) for i in instances_by_file()[file] for arch in TARGET_ARCHS)
    return hashlib.sha256("".join((_text_of_checks(), *keys)).encode()).hexdigest()


@functools.cache
def is_receipted(file):
    return receipted_digests().get(file) == digest_of_file(file)


def write_receipt():
    digests = {}
    for file, instances in instances_by_file().items():
        if not is_receipted(file):
            print(f"{file}.cu: {len(instances)} instances", flush=True)
            pairs = [(instance, arch) for instance in instances for arch in TARGET_ARCHS]
            for (instance, arch), count in zip(pairs, in_threads(spill_bytes, *zip(*pairs, strict=True)), strict=True):
                if count:
                    raise SystemExit(f"{instance} spills {count} bytes on {arch}: no receipt written")
            if may_add_floats_atomically(file):
                for instance, text in zip(instances, in_threads(ptx_of, instances), strict=True):
                    if found := float_atomics_in(text):
                        raise SystemExit(f"{instance} adds floats atomically, {found[0]}: no receipt written")
        digests[file] = digest_of_file(file)
        # After each file, so that a run that is broken off has not compiled in vain.
        known = {name: digest for name, digest in receipted_digests().items() if name in instances_by_file()} | digests
        RECEIPT.write_text(json.dumps({"nvrtc": nvrtc_version(), "archs": TARGET_ARCHS, "files": known}, indent=1) + "\n")


if __name__ == "__main__":
    write_receipt()
