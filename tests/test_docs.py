"""The pages of docs/ and README.md: what they show runs, what they name exists, and the site builds from them.

A ```python block runs, on NumPy, after those before it on its page, unless a comment before it says why not:

    <!-- gpu NAME ...: what takes a GPU -->     runs by itself in a gpu-marked test, which needs the packages named
    <!-- not run: reason -->                    runs nowhere

A ```text block right after a ```python block is what that one prints.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
_BLOCK = re.compile(
    r"(?:^<!-- (gpu|not run)([\w ]*): ?([^\n]*?) ?-->\n)?^```(\w*)[^\n]*\n(.*?)^```$(\n\n```text\n(.*?)^```$)?", re.M | re.S
)


class Block(NamedTuple):
    language: str
    code: str
    line: int
    mark: str | None  # "gpu" or "not run"
    needs: list[str]
    reason: str
    prints: str | None


def blocks_of(text):
    """The fenced blocks of a page. One that shows what the block before it prints is no block of its own."""
    found = []
    for match in _BLOCK.finditer(text):
        mark, needs, reason, language, code, _, prints = match.groups()
        line = text.count("\n", 0, match.start(5)) + 1
        found.append(Block(language, code, line, mark, (needs or "").split(), reason or "", prints))
    return found


def page_id(path):
    return path.relative_to(ROOT).as_posix()


def python_pages(mark):
    """Pages with a python block that carries this mark."""
    return [path for path in PAGES if any(b.language == "python" and b.mark == mark for b in blocks_of(path.read_text()))]


# What each block prints stands between lines that no block prints. Code keeps its lines' numbers, for tracebacks.
_RUNNER = """
import json, sys
namespace = {"__name__": "__main__"}
for line, code in json.load(sys.stdin):
    exec(compile("\\n" * (line - 1) + code, sys.argv[1], "exec"), namespace)
    print("\\x1e", flush=True)
"""


def run(path, blocks, folder, **environment):
    """What each of the blocks prints, run one after the other in a process of their own, beside examples/."""
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, page_id(path)],
        input=json.dumps([(block.line, block.code) for block in blocks]),
        capture_output=True,
        text=True,
        cwd=folder,
        env=variables | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\x1e\n")[:-1]


@pytest.mark.parametrize("path", python_pages(None), ids=page_id)
def test_python_of_a_page_runs_and_prints_what_it_says(path, tmp_path):
    blocks = [block for block in blocks_of(path.read_text()) if block.language == "python" and block.mark is None]
    printed = run(path, blocks, tmp_path, CUDA_VISIBLE_DEVICES="")
    for block, text in zip(blocks, printed, strict=True):
        assert text == (block.prints or ""), f"{page_id(path)}:{block.line}"


@pytest.mark.gpu
@pytest.mark.parametrize("path", python_pages("gpu"), ids=page_id)
def test_python_of_a_page_runs_on_a_gpu(path, tmp_path):
    """Each of these blocks stands alone."""
    blocks = [block for block in blocks_of(path.read_text()) if block.language == "python" and block.mark == "gpu"]
    known = [block for block in blocks if all(importlib.util.find_spec(name) for name in block.needs)]
    if not known:
        pytest.skip(f"none of {', '.join(sorted({name for block in blocks for name in block.needs}))} is here")
    for number, block in enumerate(known):
        folder = tmp_path / str(number)
        folder.mkdir()
        run(path, [block], folder)


def test_every_block_that_does_not_run_says_why():
    marked = [(page_id(path), block) for path in PAGES for block in blocks_of(path.read_text()) if block.mark is not None]
    assert marked and all(block.language == "python" and len(block.reason) > 8 for _, block in marked), marked
    comments = sum(len(re.findall(r"<!-- (?:gpu|not run)", path.read_text())) for path in PAGES)
    assert comments == len(marked), "a comment that does not stand right before a block marks nothing"


def test_what_a_block_prints_would_be_missed(tmp_path):
    page = (
        "Text.\n\n```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\n<!-- not run: it takes a year -->\n```python\n1 / 0\n```\n"
    )
    first, second = blocks_of(page)
    assert (first.line, first.prints, first.mark) == (4, "3\n", None)
    assert (second.mark, second.reason, second.line) == ("not run", "it takes a year", 13)
    assert run(ROOT / "README.md", [first], tmp_path) == ["2\n"] != [first.prints]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(program):
    """[(page, words after the program)] of every shell line that calls it."""
    found = []
    for path in PAGES:
        for block in blocks_of(path.read_text()):
            # The README marks no language: its blocks that begin with a command are shell.
            if block.language not in ("shell", "dockerfile", "yaml", "") or "import " in block.code:
                continue
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("RUN ").split("&&")[0], comments=True) if line.count('"') % 2 == 0 else []
                places = [place for place, word in enumerate(words) if word == program]
                found += [(page_id(path), words[places[0] + 1 :])] if places else []
    return found


def test_commands_on_the_pages_are_ones_that_cupyq_takes():
    from cupyq.cli import build_parser

    lines = commands("cupyq")
    assert len(lines) > 30
    for page, words in lines:
        if words and words != ["--version"]:
            try:
                build_parser().parse_args(words)
            except SystemExit as error:
                assert error.code in (0, None), (page, words)
            except Exception as error:
                raise AssertionError(f"{page}: cupyq {' '.join(words)}: {error}") from None


def test_make_targets_on_the_pages_exist():
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    used = {word for _, words in commands("make") for word in words[:1]}
    used |= {target for path in PAGES for target in re.findall(r"`make ([a-z]+)", path.read_text())}
    assert used and used <= set(known), used - set(known)


def test_files_that_pages_name_exist():
    named = re.compile(r"`((?:examples|benchmarks|tools|tests|docs|cupyq)/[\w./-]+\.\w+)`")
    missing = {(page_id(p), name) for p in PAGES for name in named.findall(p.read_text()) if not (ROOT / name).exists()}
    assert not missing


def test_variables_of_the_environment_are_all_explained():
    read = {name for path in (ROOT / "cupyq").rglob("*.py") for name in re.findall(r"CUPYQ_[A-Z_]+", path.read_text())}
    explained = set(re.findall(r"^\| `(CUPYQ_[A-Z_]+)` \|", (DOCS / "reference/environment.md").read_text(), re.M))
    assert read == explained


# --- names ------------------------------------------------------------------------------------------------------------


def resolve(name):
    """The object of a dotted name, AttributeError otherwise; a package's own name comes before a module called alike."""
    first, *parts = name.split(".")
    value, path = importlib.import_module(first), first
    for part in parts:
        path = f"{path}.{part}"
        if not hasattr(value, part):
            try:
                value = sys.modules.get(path) or importlib.import_module(path)
                continue
            except ModuleNotFoundError:
                # `cupyq.ops.attention.attention`: the first is shadowed by the second.
                value = sys.modules.get(path.rpartition(".")[0], value)
        value = getattr(value, part)
    return value


def listed(page):
    return re.findall(r"^::: (\S+)", (DOCS / f"reference/{page}.md").read_text(), re.M)


@pytest.mark.parametrize("package", ["ops", "layers", "models", "generate", "serve", "quantize", "tp", "ext", "interop"])
def test_every_public_name_is_in_the_reference(package):
    names = listed(package)
    assert len(names) == len(set(names))
    shown = [resolve(name) for name in names]
    public = resolve(f"cupyq.{package}")
    text = (DOCS / f"reference/{package}.md").read_text()
    for name in public.__all__:
        # Shown here, or said where else it is.
        assert any(getattr(public, name) is one for one in shown) or re.search(rf"`(cupyq\.)?({package}\.)?{name}` is", text), (
            name
        )


def test_every_format_is_in_the_reference():
    modules = {path.stem for path in (ROOT / "cupyq/formats").glob("[a-z]*.py")}
    assert {name.rpartition(".")[2] for name in listed("formats")} == modules


def names_of_cupyq(text):
    return set(re.findall(r"`(cupyq(?:\.\w+)+)[`(]", text))


def test_names_that_pages_give_exist():
    from cupyq.models import Model

    for path in PAGES:
        for name in sorted(names_of_cupyq(path.read_text())):
            resolve(name)
        for name in set(re.findall(r"`model\.(\w+)\(", path.read_text())):
            assert hasattr(Model, name), (page_id(path), name)


def test_the_migration_table_names_every_function_of_ext_and_only_names_that_exist():
    import cupyq.ext
    from cupyq.layers import quant_linear

    text = (DOCS / "migration.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(reference/\w+\.md#([\w.]+)\) \| (.*) \|$", text, re.M)
    assert len(rows) == len(re.findall(r"^\| \[`\w+`\]\(reference", text, re.M))
    lorax = ["QuantLinear", "set_device", "create_exllama_buffers"]
    assert sorted(name for name, _, _ in rows) == sorted([*cupyq.ext.__all__, *lorax])
    for name, target, instead in rows:
        # Each links to itself, and beside it stands what to use, or that there is nothing to.
        assert resolve(target) is getattr(quant_linear if name in lorax else cupyq.ext, name), name
        assert instead.strip(), name
    for name in re.findall(r"`((?:cupyq|ops|layers|serve|generate|models|quantize|tp|formats)(?:\.\w+)+)[`(]", text):
        resolve(name if name.startswith("cupyq") else f"cupyq.{name}")


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it: a warning is an error."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_a_page_for_every_file(site):
    built = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")} <= built


def test_the_site_asks_no_other_host_for_anything(site):
    loaded = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\s\">]+)|<link[^>]+href=\"?(https?:[^\s\">]+)")
    for path in site.rglob("*.html"):
        assert not loaded.findall(path.read_text()), path.name


def test_the_site_can_be_searched_where_pages_are_files(site):
    """Without a server there is no worker, and no JSON can be fetched: the index is a script, and a stand-in comes first."""
    assert (site / "search/search_index.js").read_text().startswith("var __index = {")
    for page in ("index.html", "how-to/serve.html"):
        scripts = re.findall(r'<script src="([^"]+)"', (site / page).read_text())
        assert scripts[0].endswith("assets/iframe-worker.js") and (site / page).parent.joinpath(scripts[0]).exists()


def test_the_site_shows_docstrings_commands_and_examples(site):
    ops = (site / "reference/ops.html").read_text()
    assert 'id="cupyq.ops.norm.rms_norm"' in ops and "1910.07467" in ops
    commands = (site / "reference/command-line.html").read_text()
    assert "--sensitivity-tokens" in commands and 'id="cupyq-bench-qmatmul"' in commands
    examples = (site / "reference/examples.html").read_text()
    assert all(f'id="{path.stem}"' in examples for path in (ROOT / "examples").glob("*.py"))


# --- docstrings as Markdown -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def to_markdown():
    if importlib.util.find_spec("griffe") is None:
        pytest.skip("griffe is not installed: pip install '.[docs]'")
    from docs_docstrings import to_markdown

    return to_markdown


def test_a_formula_is_not_taken_for_markup(to_markdown):
    assert to_markdown("y = x * w * v, x [..., n] < 2") == r"**y = x \* w \* v, x \[..., n\] &lt; 2**"
    assert to_markdown("A *stored row* of `x**2`.") == "**A *stored row* of `x**2`.**"


def test_the_first_sentence_stands_out_whole(to_markdown):
    assert to_markdown("Scales, and\nthe bias, of a layer. In bits.") == "**Scales, and the bias, of a layer.**\n\nIn bits."
    assert to_markdown("y = x, plus\n`bias`\n\nShapes.") == "**y = x, plus `bias`**\n\nShapes."
    assert to_markdown("|x|, a size.") == "**&#124;x&#124;, a size.**"
    assert to_markdown("Sizes.\n\n| a | b |\n|---|---|\n| 1 | 2 |").endswith("| a | b |\n|---|---|\n| 1 | 2 |")


def test_columns_and_doctests_keep_their_lines(to_markdown):
    text = "First.\n\nname   what it is, which\n       goes on\nother  more\n\n>>> f(1)\n2\n\n    a = b\n    c = d"
    assert to_markdown(text).split("\n\n") == [
        "**First.**",
        "| | |\n|---|---|\n| `name` | what it is, which goes on |\n| `other` | more |",
        "```pycon\n>>> f(1)\n2\n```",
        "```text\na = b\nc = d\n```",
    ]


def test_names_too_long_for_their_column_are_names_still(to_markdown):
    text = "First.\n\nshort      what it is\none, two, three\n           what these are"
    assert to_markdown(text).endswith("| `short` | what it is |\n| `one`, `two`, `three` | what these are |")


def test_a_line_that_ends_early_ends_a_paragraph(to_markdown):
    full = "word " * 22 + "end."
    assert to_markdown(f"First.\n\n{full}\nStill the same.\nAnother.") == f"**First.**\n\n{full} Still the same.\n\nAnother."


# --- workflows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["cpu.yml", "gpu.yml"])
def test_workflows_run_what_the_makefile_has(file):
    text = (ROOT / ".github/workflows" / file).read_text()
    targets = re.findall(r"run: make ([a-z]+)", text)
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert targets and set(targets) <= set(known)
    assert "permissions:\n  contents: read" in text and "pull_request_target" not in text
    # A machine of one's own works for nobody's pull request.
    assert ("self-hosted" in text) == (file == "gpu.yml") == ("pull_request" not in text)


def test_figures_are_what_their_script_draws(tmp_path):
    import draw_figures

    names = draw_figures.main([str(tmp_path)])
    assert names
    for name in names:
        assert (tmp_path / name).read_text() == (DOCS / "figures" / name).read_text(), (
            f"run `python tools/draw_figures.py`: {name}"
        )


def test_figures_on_the_pages_exist_and_have_words_for_those_who_cannot_see_them():
    shown = [(path, *found) for path in PAGES for found in re.findall(r"!\[(.*?)\]\((.+?)\)", path.read_text(), re.S)]
    assert len(shown) > 6
    for path, words, target in shown:
        assert len(words) > 20 and Path(path.parent, target).exists(), (path, target)
