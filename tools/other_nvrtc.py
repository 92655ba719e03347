"""GPU tests on kernels that another NVRTC compiled, say CUDA 12's on a machine with CUDA 13.

    PYTHONPATH=tools OTHER_NVRTC_LIST=used.txt python -m pytest -p other_nvrtc -m gpu      writes down which kernels are loaded
    python tools/other_nvrtc.py used.txt --arch sm_90a                                     elsewhere: compiles them, prints 12.9
    PYTHONPATH=tools OTHER_NVRTC=12.9 OTHER_NVRTC_LIST=again.txt python -m pytest -p other_nvrtc -m gpu

CUPYQ_CACHE_DIR is the folder of the compiled kernels, and is carried from the second machine to the third run. There, tests
take what is in it for their own; what it lacks is compiled here, and is in the list with a mark.
"""

import argparse
import os
import sys
from pathlib import Path

from cupyq import _kernels

_compiled_here = set()


def pytest_configure(config):
    real = _kernels.compile_instance

    def noting(wanted, *arguments):
        _compiled_here.add(wanted)
        return real(wanted, *arguments)

    _kernels.compile_instance = noting
    if version := os.environ.get("OTHER_NVRTC"):
        other = tuple(map(int, version.split(".")))
        _kernels.load_nvrtc().getVersion = lambda: other  # of which all that is asked for is the key of the cache


def pytest_sessionfinish(session):
    with open(os.environ["OTHER_NVRTC_LIST"], "a", encoding="utf-8") as file:
        for wanted in sorted({wanted for wanted, _ in _kernels.loaded}):
            print(wanted.file, wanted.expression, *["compiled here"] * (wanted in _compiled_here), sep="\t", file=file)


def read_list(path):
    """{instance: whether any process compiled it for itself} of what the processes of a run wrote."""
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        file, expression, *marks = line.split("\t")
        wanted = _kernels.Instance(file, expression)
        found[wanted] = found.get(wanted, False) or bool(marks)
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", help="what a run wrote")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--count", action="store_true", help="only say how many kernels were loaded and compiled there")
    options = parser.parse_args(arguments)
    found = read_list(options.list)
    if options.count:
        print(f"{len(found)} kernels, {sum(found.values())} of them compiled where they ran")
        return 0
    count = _kernels.compile_all(found, options.arch)
    version = ".".join(map(str, _kernels.load_nvrtc().getVersion()))
    print(f"{count} of {len(found)} compiled into {_kernels.cache_folder()} by NVRTC {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
