"""tools/other_nvrtc.py: lists of kernels, and a cache that is found as another NVRTC's."""

import sys

import pytest
from conftest import ROOT, needs_cupy

sys.path.insert(0, str(ROOT / "tools"))

import other_nvrtc

from cupyq import _kernels

ARCH = "sm_90a"
ONE, OTHER = _kernels.instance("advance"), _kernels.instance("clamp", "half", 1)


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    needs_cupy()
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setenv("OTHER_NVRTC_LIST", str(tmp_path / "list"))
    monkeypatch.setattr(_kernels, "compile_instance", _kernels.compile_instance)
    monkeypatch.setattr(_kernels, "loaded", {})
    monkeypatch.setattr(other_nvrtc, "_compiled_here", set())
    found = _kernels.load_nvrtc()
    monkeypatch.setattr(found, "getVersion", found.getVersion)
    return found


def test_kernels_are_found_as_those_of_the_other_one(nvrtc, monkeypatch, tmp_path, capsys):
    listed = tmp_path / "list"
    listed.write_text(f"{ONE.file}\t{ONE.expression}\n" * 2)
    assert other_nvrtc.main([str(listed), "--arch", ARCH]) == 0
    assert capsys.readouterr().out.startswith(f"1 of 1 compiled into {tmp_path / 'kernels'} by NVRTC ")
    monkeypatch.setenv("OTHER_NVRTC", ".".join(map(str, nvrtc.getVersion())))
    nvrtc.getVersion = lambda: (99, 1)  # the one that is here when tests run
    other_nvrtc.pytest_configure(None)
    for wanted in (ONE, OTHER):
        _kernels.loaded[wanted, 0] = _kernels.compiled(wanted, ARCH)
    listed.unlink()
    for _ in range(2):  # as two processes
        other_nvrtc.pytest_sessionfinish(None)
    assert other_nvrtc.read_list(listed) == {ONE: False, OTHER: True}
    assert other_nvrtc.main([str(listed), "--count"]) == 0
    assert capsys.readouterr().out == "2 kernels, 1 of them compiled where they ran\n"
