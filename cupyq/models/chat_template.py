"""Messages to the text a chat model was trained on, by the template its publisher ships.

A template is a program from the internet, in the language of jinja2. It runs in jinja2's immutable sandbox, sees plain values
alone (strings, numbers, lists, dicts), and gets what templates of transformers rely on: `messages`, `tools`, `documents`,
`add_generation_prompt`, `bos_token`, `eos_token` and the other special tokens; `raise_exception(text)`,
`strftime_now(format)`, a `tojson` that leaves HTML alone, `{% break %}`, `{% continue %}` and `{% generation %}`, whose
content is kept. Facts: huggingface/transformers, utils/chat_template_utils.py. Needs the package jinja2.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cupyq._json_file import read_json, read_text
from cupyq.errors import BackendError, FormatError

MAX_CHARACTERS = 256 << 10
"""Of a template: ten times the longest published ones, and some seconds to compile."""
_HINT = "copy the tokenizer's files again from the original model"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, where: str = "chat template"):
        """source: the template's text; special_tokens: {"bos_token": ...}; `where` starts messages about it.

        FormatError for a template that cannot be compiled, BackendError without jinja2.
        """
        if not isinstance(source, str):
            raise TypeError(f"source must be the template's text, got {type(source).__name__}")
        self.source, self.special_tokens, self.where = source, dict(special_tokens or {}), where
        if len(source) > MAX_CHARACTERS:
            raise FormatError(f"{where}: {len(source)} characters, expected a template of at most {MAX_CHARACTERS}")
        _require_jinja2()
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # jinja2's own, and Python's on what jinja2 made of the template
            line = getattr(error, "lineno", None)
            raise FormatError(f"{where}: no template ({_one_line(error)}{f', line {line}' if line else ''})") from None

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], name: str | None = None) -> "ChatTemplate":
        """The template of a model folder: chat_template.jinja, else chat_template.json, else in tokenizer_config.json.

        name: of the one wanted where there are several, such as "tool_use"; default: "default". Others than the default lie
        in additional_chat_templates/<name>.jinja. FormatError where there is none.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FormatError(f"{folder}: no such folder; name the folder that holds the model's config.json")
        config = _read_settings(folder / "tokenizer_config.json")
        tokens = _special_tokens(folder, config)
        wanted = "default" if name is None else name
        if not isinstance(wanted, str) or wanted != Path(wanted).name:
            raise ValueError(f"name must be that of a template, such as 'tool_use', got {name!r}")
        is_default = wanted == "default"
        path = folder / ("chat_template.jinja" if is_default else f"additional_chat_templates/{wanted}.jinja")
        if os.path.lexists(path):
            return cls(read_text(path, hint=_HINT), tokens, str(path))
        found: dict[str, str] = {}
        for path, keys in ((folder / "chat_template.json", None), (folder / "tokenizer_config.json", config)):
            keys = _read_settings(path) if keys is None else keys
            found = _templates(path, keys)
            if wanted in found:
                return cls(found[wanted], tokens, f"{path}: chat_template")
            if found:
                break
        if found:
            raise FormatError(f"{path}: chat_template: no template {wanted!r}, only {', '.join(map(ascii, found))}")
        what = "a model that was not trained to chat has none" if is_default else f"there is none called {wanted!r}"
        raise FormatError(f"{folder}: no chat_template.jinja, nor chat_template in tokenizer_config.json; {what}")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens included: tokenize it without adding them again.

        messages: dicts of "role" and "content" (text, or a list of parts as the template knows them). add_generation_prompt:
        end with what begins the model's answer. tools: JSON schemas of functions. variables: further ones that the template
        reads. TypeError / ValueError for messages that are none, FormatError where the template refuses them or fails.
        """
        checked = _checked_messages(messages)
        own = {"messages": checked, "tools": _plain(tools, "tools"), "documents": _plain(documents, "documents")}
        given = {name: _plain(value, name) for name, value in variables.items()}
        options = {**self.special_tokens, **given, **own, "add_generation_prompt": bool(add_generation_prompt)}
        try:
            return self._template.render(options)
        except _Refused as error:
            raise FormatError(f"{self.where}: refuses these messages: {_one_line(error)}") from None
        except Exception as error:  # whatever a program may raise
            raise FormatError(f"{self.where}: failed on these messages ({type(error).__name__}: {_one_line(error)})") from None


class _Refused(Exception):
    """What raise_exception raises."""


def _require_jinja2() -> Any:
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise BackendError("chat templates need the package jinja2: pip install 'cupyq[chat]'") from None
    # The first release without a known way out of its sandbox.
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise BackendError(f"chat templates need jinja2 3.1.6 or newer, found {jinja2.__version__}: pip install -U jinja2")
    return jinja2


def _environment() -> Any:
    jinja2 = _require_jinja2()

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model is trained to say; here it is text like any other."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Without names that lead into Python."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")
            super().__setitem__(name, value)

    # Nothing of a template is run before it is rendered: 9 ** (9 ** 9) would be worked out while it is compiled.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        optimized=False,
        finalize=jinja2.pass_context(_unchanged),
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": Namespace}
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _unchanged(context: Any, value: Any) -> Any:
    """What is written of a value: jinja2 works out nothing ahead of which the context might change."""
    return value


def _refuse(message: Any) -> None:
    raise _Refused(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


# --- what goes in -----------------------------------------------------------------------------------------------------


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dicts with 'role' and 'content', got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{index}] must be a dict with 'role' and 'content', got {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] must have a 'role', such as 'user', got {message.get('role')!r}")
    return _plain(messages, "messages")


def _plain(value: Any, where: str) -> Any:
    """A copy of plain types alone: a template calls what methods its values have."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{where} must be text, a number, a list or a dict, got {type(value).__name__}")


# --- what a folder holds ----------------------------------------------------------------------------------------------


def _read_settings(path: Path) -> dict[str, Any]:
    """Its keys; none where there is no such file."""
    return read_json(path, hint=_HINT) if os.path.lexists(path) else {}


def _templates(path: Path, keys: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: one is a string, several are a list of {"name": ..., "template": ...}."""
    found = keys.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {None: None}
    if not all(isinstance(text, str) for both in named.items() for text in both):
        raise FormatError(f"{path}: chat_template: expected a string, or a list of objects with a name and a template")
    return named


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role, as text. Old tokenizers have them in special_tokens_map.json alone."""
    tokens = {}
    path = folder / "special_tokens_map.json"
    for where, keys in ((path, _read_settings(path)), (folder / "tokenizer_config.json", config)):
        for role in _SPECIAL_TOKENS:
            token = keys.get(role)
            if isinstance(token, dict):  # an AddedToken
                token = token.get("content")
            if token is None:
                continue
            if not isinstance(token, str):
                raise FormatError(f"{where}: {role}: found {ascii(token)[:100]}, expected a token's text")
            tokens[role] = token
    return tokens


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
