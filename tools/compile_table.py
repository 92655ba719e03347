"""Compile every listed kernel instance without a GPU and print what it costs, as the table of docs/measured.md.

python tools/compile_table.py [sm_90a]
"""

import importlib
import pkgutil
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cupyq import _kernels, ops  # noqa: E402


@dataclass(frozen=True)
class Compiled:
    """What one instance came to."""

    instance: _kernels.Instance
    seconds: float  # of processor time
    code_bytes: int
    registers: int
    spill_bytes: int


def op_modules():
    """The modules of cupyq.ops, in the order of their names."""
    return [importlib.import_module(f"cupyq.ops.{module.name}") for module in pkgutil.iter_modules(ops.__path__)]


def listed_instances():
    """Every distinct instance that an op module lists in INSTANCES, sorted by file."""
    return sorted({instance for module in op_modules() for instance in getattr(module, "INSTANCES", ())})


def compile_and_read_log(instance, arch):
    start = time.thread_time()
    code, _, log = _kernels.compile_instance(instance, arch, ("--ptxas-options=-v",))
    seconds = time.thread_time() - start
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)), default=0)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    if registers == 0:
        raise RuntimeError(f"the compiler's log of {instance} for {arch} reports no registers: {log!r}")
    return Compiled(instance, seconds, len(code), registers, spills)


def _processor():
    """The processor's name where the system tells, else its architecture."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def print_table(arch):
    # The first compilation of a process also loads NVRTC's own library.
    instances = listed_instances()
    _kernels.compile_instance(instances[0], arch)
    results = [compile_and_read_log(instance, arch) for instance in instances]
    nvrtc = ".".join(map(str, _kernels.load_nvrtc().getVersion()))
    total = sum(result.seconds for result in results)
    print(f"{arch}, NVRTC {nvrtc}, {_processor()}: {len(results)} instances, {total:.0f} s of one core\n")
    print("| file | instances | mean s | slowest s | slowest instance | KB | registers |")
    print("|---|---|---|---|---|---|---|")
    for file in sorted({result.instance.file for result in results}):
        rows = [result for result in results if result.instance.file == file]
        slowest = max(rows, key=lambda row: row.seconds)
        registers = sorted({row.registers for row in rows})
        print(
            f"| {file}.cu | {len(rows)} | {sum(row.seconds for row in rows) / len(rows):.2f} | {slowest.seconds:.2f} "
            f"| `{slowest.instance.expression}` | {sum(row.code_bytes for row in rows) / 1024:.0f} "
            f"| {registers[0]}{f' to {registers[-1]}' if len(registers) > 1 else ''} |"
        )


if __name__ == "__main__":
    print_table(*sys.argv[1:] or ["sm_90a"])
