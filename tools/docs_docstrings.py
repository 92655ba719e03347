"""Docstrings of cupyq as Markdown: an extension of griffe, which reads the sources for the documentation site (mkdocs.yml).

Docstrings here are plain text for people who read them in an editor: paragraphs, tables whose columns are aligned by spaces,
indented formulas, doctests. A site would run these together. So tables, formulas and doctests become blocks of their own, and
what Markdown would take for markup in a paragraph (`x**2`, `[..., dim]`) is escaped. No docstring is written for the site.
"""

import itertools
import re

import griffe

_FULL = 112
"""Characters of a line, with one word more, that might have gone on: the limit of the sources less their indentation."""

_CODE = re.compile(r"(`[^`]+`)")
_MARKUP = re.compile(r"([\\*_{}\[\]<>#|])")
_ESCAPES = {"<": "&lt;", ">": "&gt;", "|": "&#124;"}
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_EMPHASIS = re.compile(r"(?<![\w*])\*([A-Za-z][^*]*[A-Za-z])\*(?![\w*])")
_COLUMNS = re.compile(r"\S {2,}\S")
_NAMED = re.compile(r"(\S+(?:, \w+)*) {2,}(?=\S)")
_NAMES = re.compile(r"\w+(?:, \w+)*")


def to_markdown(text):
    """Markdown that shows a plain docstring as it was meant: the first line, which says what it is, stands out."""
    parts = []
    for paragraph in re.split(r"\n[ ]*\n", text.strip("\n")):
        parts += _blocks(paragraph.split("\n"))
    if parts and not parts[0].startswith("```"):
        parts[0] = _with_headline(parts[0], text.strip().split("\n")[0])
    return "\n\n".join(parts)


def _blocks(lines):
    """The Markdown blocks of lines without an empty one among them."""
    kinds = [_kind(line) for line in lines]
    for place, line in enumerate(lines):
        # Names alone in their line, too long for the first column, with their meaning below.
        if _NAMES.fullmatch(line) and place + 1 < len(lines) and lines[place + 1].startswith(8 * " "):
            kinds[place] = "table"
        # What is indented below a row of a table goes on with it.
        if place and line.startswith(" ") and kinds[place - 1] == "table":
            kinds[place] = "table"
    blocks, start = [], 0
    for end in range(1, len(lines) + 1):
        if end < len(lines) and (kinds[end] == kinds[start] or kinds[start] == "doctest"):
            continue
        run = lines[start:end]
        if kinds[start] == "doctest":
            blocks.append("```pycon\n" + "\n".join(run) + "\n```")
        elif kinds[start] == "text":
            blocks += [escaped(" ".join(sentences)) for sentences in _paragraphs([line.strip() for line in run])]
        elif all(_is_row(line) for line in run):
            blocks.append("\n".join(line.strip() for line in run))  # a table of Markdown already
        else:
            least = min(len(line) - len(line.lstrip()) for line in run)
            run = [line[least:].rstrip() for line in run]
            blocks.append(_names_and_meanings(run) or "```text\n" + "\n".join(run) + "\n```")
        start = end
    return blocks


def _paragraphs(lines):
    """Lines of text, cut where a line ended before it was full: there its author began a new one on purpose."""
    paragraphs = [[lines[0]]]
    for before, line in itertools.pairwise(lines):
        if before.endswith((".", ":")) and len(before) + len(line.split()[0]) < _FULL:
            paragraphs.append([])
        paragraphs[-1].append(line)
    return paragraphs


def _names_and_meanings(lines):
    """A table of Markdown for lines that say, in two columns, what each name means; None where they do not."""
    first = _NAMED.match(lines[0])
    if first is None:
        return None
    rows, column = [], first.end()
    for line in lines:
        if _NAMES.fullmatch(line):
            rows.append((line, []))
            continue
        name, meaning = line[:column].strip(), line[column:]
        is_named = not name or _NAMED.match(line)
        if not is_named or meaning.startswith(" ") or not meaning or not line[:column].endswith("  "):
            return None
        if _COLUMNS.search(meaning):
            return None  # a third column
        if name:
            rows.append((name, [meaning]))
        else:
            rows[-1][1].append(meaning)
    table = [f"| {_as_code(name)} | {escaped(' '.join(meanings))} |" for name, meanings in rows]
    return "\n".join(["| | |", "|---|---|", *table])


def _as_code(names):
    return ", ".join(escaped(name) if "`" in name or "|" in name else f"`{name}`" for name in names.split(", "))


def _kind(line):
    if line.lstrip().startswith(">>>"):
        return "doctest"
    if line.startswith("    ") or _is_row(line):
        return "table"
    return "table" if _COLUMNS.search(_CODE.sub("`", line)) else "text"


def _is_row(line):
    """Whether a line is one of a table of Markdown; `|x|, a size` is none."""
    return re.fullmatch(r"\s*\|.*\|\s*", line) is not None


def _with_headline(first, line):
    """The first paragraph with the docstring's first line set apart, and the lines on which its sentence goes on."""
    headline = escaped(line.strip())
    rest = first.removeprefix(headline)
    if rest and not headline.endswith((".", ":")):
        ends = re.search(r"[.:](?=\s|$)", rest)
        headline += rest[: ends.end()] if ends else rest
    rest = first.removeprefix(headline).strip()
    return f"**{headline}**" + (f"\n\n{rest}" if rest else "")


def escaped(text):
    """Text with nothing in it that Markdown would read as markup, but for `code`; papers become links."""
    pieces = _CODE.split(text)
    for place in range(0, len(pieces), 2):
        texts = _EMPHASIS.split(pieces[place])  # every second one was between asterisks
        texts = [_MARKUP.sub(lambda found: _ESCAPES.get(found[1], f"\\{found[1]}"), one) for one in texts]
        piece = "".join(f"*{one}*" if number % 2 else one for number, one in enumerate(texts))
        pieces[place] = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", piece)
    return "".join(pieces)


class PlainText(griffe.Extension):
    """Rewrites the docstring of every object that griffe finds."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None and not getattr(obj, "is_alias", False):
            obj.docstring.value = to_markdown(obj.docstring.value)
