"""Install the wheel as a user would, under every Python, extra and home folder given, and try what a user tries first.

python tools/install_matrix.py dist/cupyq-*.whl --python python3.11 python3.13 --extra none cuda12 cuda13

Each Python and extra gets an environment of its own below --folder, which is removed afterwards; nothing of this checkout is
imported but the examples' models are read. Prints a table in Markdown, and exits with 1 where a check failed.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "models" / "shakespeare-exl2-4.0"
HOMES = ("new", "read-only", "none")  # an empty folder; one that cannot be written to; one that cannot be made
# What a broken installation of CuPy does when it is imported: the text of its __init__.py.
BROKEN = {
    "CuPy that raises ImportError": "raise ImportError('libcublas.so.12: cannot open shared object file')",
    "CuPy that raises AttributeError": "import numpy\nnumpy.what_went_away",
    "CuPy that raises RuntimeError": "raise RuntimeError('CuPy and its libraries\\ndo not fit')",
    "CuPy, an empty folder": None,  # what uninstalling may leave
}
# `cupyq compile` for two kernels in place of all.
COMPILE = (
    "import sys; from cupyq import cli; everything = list(cli.all_instances()); cli.all_instances = lambda: everything[:2]; "
    "sys.exit(cli.main(['compile', '--arch', 'sm_90a']))"
)


@dataclass(frozen=True)
class Place:
    """An environment, and what of the surroundings its programs see."""

    environment: Path
    home: Path
    variables: dict

    def call(self, *command):
        """(exit code, stdout, stderr) of a program of the environment, called from outside of the checkout."""
        variables = {"PATH": f"{self.environment / 'bin'}:/usr/bin:/bin", "HOME": str(self.home), "LANG": "C.UTF-8"}
        command = [str(self.environment / "bin" / command[0]), *command[1:]]
        if os.geteuid() == 0:  # root writes to every folder, unless it gives that up
            command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
        done = subprocess.run(
            command,
            env=variables | self.variables,
            cwd=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout, done.stderr


def expect(ok, what, result):
    if not ok:
        code, out, err = result
        raise AssertionError(f"{what}; exit code {code}, stdout {out[-600:]!r}, stderr {err[-600:]!r}")


def is_one_line_error(result):
    code, _, err = result
    return code == 2 and err.startswith("cupyq: error: ") and err.count("\n") == 1 and "unexpected" not in err


# --- the checks: each takes a Place and the extra, and raises AssertionError ------------------------------------------


def check_import(place, extra):
    result = place.call("python", "-W", "error", "-c", "import cupyq, sys; print(cupyq.__file__, 'cupy' in sys.modules)")
    expect(result[0] == 0 and "site-packages" in result[1] and result[1].endswith("False\n"), "import cupyq", result)


def check_version(place, extra):
    result = place.call("cupyq", "--version")
    expect(result[0] == 0 and re.fullmatch(r"cupyq \d+\.\d+\.\d+\n", result[1]) and not result[2], "cupyq --version", result)


def check_doctor(place, extra):
    result = place.call("cupyq", "doctor")
    said = "Models run on the" in result[1].splitlines()[-1] if result[1] else False
    expect(result[0] == 0 and said and "Traceback" not in result[1] + result[2], "cupyq doctor", result)
    expect("unexpected" not in result[1] and "see the message" not in result[1], "doctor has no advice", result)


def check_generate(place, extra):
    result = place.call("cupyq", "generate", str(MODEL), "--prompt", "ROMEO:", "--greedy", "--max-new-tokens", "8")
    expect(result[0] == 0 and "Traceback" not in result[2], "cupyq generate", result)
    # A CuPy that is there and cannot be imported is warned of, once; nothing else is.
    warned = result[2].count("Warning")
    expect(warned == result[2].count("CuPy cannot be imported") <= 1, "cupyq generate warns", result)
    expect(warned or not place.variables, "cupyq generate says nothing of a broken CuPy", result)
    expect("ROMEO:" in result[1] or result[1].strip(), "cupyq generate says nothing", result)
    check_generate.said.add(result[1])
    expect(len(check_generate.said) == 1, "cupyq generate says something else than before", result)


check_generate.said = set()


def check_readme(place, extra):
    (example,) = re.findall(r"## Ten lines\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = example.replace("examples/models", str(MODEL.parent)) + "print(logits.shape, y.dtype)"
    result = place.call("python", "-c", example)
    expect(result[0] == 0 and "float16" in result[1], "the README's example", result)


def check_compile(place, extra):
    result = place.call("python", "-c", COMPILE)
    if extra == "none":
        expect(is_one_line_error(result), "compile without CuPy", result)
        return
    if result[0] != 0:  # it must say which variables help, and they must
        variables = dict(place.variables)
        folder = tempfile.mkdtemp(dir=place.environment)
        for _ in range(2):
            expect(is_one_line_error(result), "compile with a home that cannot be written to", result)
            named = re.search(r"set (CUPYQ?_CACHE_DIR)", result[2])
            expect(named is not None and named[1] not in variables, "compile says nothing that helps", result)
            variables[named[1]] = folder
            result = Place(place.environment, place.home, variables).call("python", "-c", COMPILE)
            if result[0] == 0:
                break
    expect(result[0] == 0 and "2 kernels in " in result[1], "cupyq compile", result)


CHECKS = {
    "import": check_import,
    "--version": check_version,
    "doctor": check_doctor,
    "generate": check_generate,
    "README": check_readme,
    "compile": check_compile,
}


def check_broken(place):
    """`place` has a stand-in for CuPy that cannot be imported: all works on NumPy, and who asks for CuPy is told."""
    for check in (check_import, check_doctor, check_generate, check_readme):
        check(place, "none")
    result = place.call("python", "-c", COMPILE)
    expect(is_one_line_error(result) and "CuPy cannot be imported" in result[2], "compile with a broken CuPy", result)
    result = place.call("cupyq", "generate", str(MODEL), "--prompt", "ROMEO:", "--backend", "cupy")
    expect(is_one_line_error(result) and "CuPy cannot be imported" in result[2], "--backend cupy with a broken CuPy", result)


# --- the matrix -------------------------------------------------------------------------------------------------------


def make_environment(python, folder, packages):
    subprocess.run([python, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Compiling what was installed to bytecode takes minutes with CuPy's libraries, and is done at import anyway.
    subprocess.run([*install, "--no-compile", "--no-cache-dir", *packages], check=True)


def make_homes(folder):
    homes = {name: folder / name for name in HOMES}
    homes["new"].mkdir(parents=True)
    homes["read-only"].mkdir(mode=0o500)
    homes["none"] = Path("/proc/no-home")
    return homes


def lowest_numpy():
    return re.search(r'"numpy>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]


def try_cell(row, name, check, *arguments):
    try:
        check(*arguments)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        row[name] = "**fails**"
        print(f"{row['Python']} {row['extra']} {row['home']} {name}: {error}", file=sys.stderr, flush=True)
    else:
        row.setdefault(name, "ok")


def rows_of(python, extra, wheel, folder):
    """The rows of one environment: a home folder each, then what is broken or old on purpose."""
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    environment = folder / "environment"
    start = time.perf_counter()
    make_environment(python, environment, [f"{wheel}{'' if extra == 'none' else f'[{extra}]'}"])
    print(f"{version} {extra}: installed in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    homes = make_homes(folder / "homes")
    for home, path in homes.items():
        row = {"Python": version, "extra": extra, "home": home}
        for name, check in CHECKS.items():
            try_cell(row, name, check, Place(environment, path, {}), extra)
        yield row
    if extra == "none":
        for number, (label, text) in enumerate(BROKEN.items()):
            stand_in = folder / f"broken-{number}" / "cupy"
            stand_in.mkdir(parents=True)
            if text is not None:
                (stand_in / "__init__.py").write_text(text)
            row = {"Python": version, "extra": label, "home": "new"}
            place = Place(environment, homes["new"], {"PYTHONPATH": str(stand_in.parent)})
            outcome = {**row}
            try_cell(outcome, "all", check_broken, place)
            yield row | dict.fromkeys(CHECKS, outcome["all"])
        make_environment(python, environment, [f"numpy=={lowest_numpy()}"])
        row = {"Python": version, "extra": f"numpy {lowest_numpy()}", "home": "new"}
        for name, check in CHECKS.items():
            try_cell(row, name, check, Place(environment, homes["new"], {}), extra)
        yield row
    shutil.rmtree(environment)


def table(rows):
    columns = ["Python", "extra", "home", *CHECKS]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=lambda text: Path(text).resolve(strict=True))
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters; default: this one")
    parser.add_argument("--extra", nargs="+", default=["none"], help="none, cuda12, cuda13; default: none")
    parser.add_argument("--folder", type=Path, help="where environments are made; default: a temporary folder")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="install-") as folder:
        for number, (extra, python) in enumerate((e, p) for e in arguments.extra for p in arguments.python):
            rows += rows_of(python, extra, arguments.wheel, Path(folder) / str(number))
    print(f"{platform.system()} {platform.machine()}, {arguments.wheel.name}\n\n{table(rows)}")
    return int(any("**fails**" in row.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
