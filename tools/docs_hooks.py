"""What the documentation site takes from the sources when it is built: the help of every command, and the examples.

A page asks for it by a comment, `<!-- command line -->` or `<!-- examples -->`, which is replaced here. mkdocs.yml names this
file among its hooks.
"""

import argparse
import ast
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent

_COLUMNS = 94  # of a page beside its table of contents


def on_page_markdown(markdown, **_):
    for comment, text in (("<!-- command line -->", command_line), ("<!-- examples -->", examples)):
        if comment in markdown:
            markdown = markdown.replace(comment, text())
    return markdown


def command_line():
    """A section for each command, with what its --help prints."""
    sys.path.insert(0, str(ROOT))
    from cupyq.cli import build_parser

    return "\n\n".join(_sections(build_parser(), 2))


def _sections(parser, level):
    name = "cupyq" if level == 2 else parser.prog
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=_COLUMNS)
    parser.description = parser.description and textwrap.fill(parser.description, _COLUMNS)
    yield f"{'#' * min(level, 4)} {name}\n\n```text\n{parser.format_help().rstrip()}\n```"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _sections(sub, level + 1)


def examples():
    """A section for each example: its docstring's first line and its source."""
    sections = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        first = ast.get_docstring(ast.parse(source)).splitlines()[0]
        sections.append(
            f'## {path.stem}\n\n{_as_text(first)}\n\n```python title="examples/{path.name}"\n{source.rstrip()}\n```'
        )
    return "\n\n".join(sections)


def _as_text(line):
    text, colon, command = line.partition(": python ")
    return f"{text}:\n\n```shell\npython {command}\n```" if colon else text
