"""models/chat_template.py: templates in the manner of common families, where they lie, and what they cannot do."""

import json
import sys
from datetime import datetime

import pytest

from cupyq.errors import BackendError, FormatError
from cupyq.models.chat_template import ChatTemplate

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set rest, system = messages[1:], messages[0]['content'] %}
{%- else %}
    {%- set rest, system = messages, false %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set content = message['content'].strip() %}
    {%- if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{% endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + ns.system + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}
{{ '<start_of_turn>' + role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
QWEN_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'ping' %}{% continue %}{% endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{ message.content }}{% endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
"""

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Who? "},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Why?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {"type": "function", "function": {"name": "add", "description": "a < b & 'é'"}}


def test_chatml():
    template = ChatTemplate(CHATML)
    assert template.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_llama2():
    template = ChatTemplate(LLAMA2, TOKENS)
    expected = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho? [/INST] I. </s><s>[INST] Why? [/INST]"
    assert template.render(TALK) == expected
    with pytest.raises(FormatError, match="^a file: refuses these messages: Conversation roles must alternate") as caught:
        ChatTemplate(LLAMA2, TOKENS, "a file").render(TALK[2:])
    assert "\n" not in str(caught.value)


def test_llama3():
    template = ChatTemplate(LLAMA3, {"bos_token": "<|begin|>"})
    text = template.render(TALK, date_string="01 Jan 2025")
    assert text == (
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 01 Jan 2025\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nI.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    days = [datetime.now().strftime("%d %b %Y")]
    text = template.render(TALK, tools=[TOOL])
    days.append(datetime.now().strftime("%d %b %Y"))
    assert any(f"Today Date: {day}\n" in text for day in days)
    assert json.dumps(TOOL, indent=4, ensure_ascii=False) in text


def test_gemma_with_parts():
    template = ChatTemplate(GEMMA, {"bos_token": "<bos>"})
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    text = template.render(messages).replace("\n", "|")
    assert text == "<bos><start_of_turn>user|<image>What is it?<end_of_turn>|<start_of_turn>model|A cat.<end_of_turn>|" + (
        "<start_of_turn>model|"
    )


def test_tools_loop_controls_and_marked_generations():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    messages = [{"role": "ping"}, HELLO[0], call, {"role": "stop"}, HELLO[0]]
    text = ChatTemplate(QWEN_TOOLS).render(messages, tools=[TOOL])
    assert text == (
        "<|im_start|>system\n# Tools\n<tools>\n" + json.dumps(TOOL, ensure_ascii=False) + "\n</tools><|im_end|>\n"
        '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<tool_call>add {"a": 1}</tool_call><|im_end|>\n'
    )
    assert "Tools" not in ChatTemplate(QWEN_TOOLS).render(HELLO)


def test_documents_and_further_variables():
    source = "{% for d in documents or [] %}{{ d.text }};{% endfor %}{{ thinking | default('off') }}{{ eos_token }}"
    template = ChatTemplate(source, TOKENS)
    assert template.render(HELLO, documents=[{"text": "one"}, {"text": "two"}], thinking="on") == "one;two;on</s>"
    assert template.render(HELLO) == "off</s>"


# --- where templates lie ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    def make(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


def test_a_template_in_tokenizer_config(folder):
    added = {"content": "<b>", "lstrip": False, "special": True}
    path = folder(tokenizer_config_dot_json={"chat_template": CHATML, "bos_token": added, "eos_token": None})
    template = ChatTemplate.from_folder(path)
    assert template.source == CHATML and template.special_tokens == {"bos_token": "<b>"}
    folder(special_tokens_map_dot_json={"eos_token": "</e>", "bos_token": "<other>"})
    assert ChatTemplate.from_folder(path).special_tokens == {"bos_token": "<b>", "eos_token": "</e>"}


def test_which_file_comes_first(folder):
    path = folder(tokenizer_config_dot_json={"chat_template": "config"})
    assert ChatTemplate.from_folder(str(path)).render(HELLO) == "config"
    folder(chat_template_dot_json={"chat_template": "json"})
    assert ChatTemplate.from_folder(path).render(HELLO) == "json"
    folder(chat_template_dot_jinja="jinja{{ bos_token }}")
    assert ChatTemplate.from_folder(path).render(HELLO) == "jinja"


def test_several_templates(folder):
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    path = folder(tokenizer_config_dot_json={"chat_template": several})
    assert ChatTemplate.from_folder(path).render(HELLO) == "one"
    assert ChatTemplate.from_folder(path, "tool_use").render(HELLO) == "two"
    with pytest.raises(FormatError, match="chat_template: no template 'rag', only 'default', 'tool_use'"):
        ChatTemplate.from_folder(path, "rag")
    folder(additional_chat_templates__rag_dot_jinja="three")
    assert ChatTemplate.from_folder(path, "rag").render(HELLO) == "three"
    with pytest.raises(ValueError, match="name must be that of a template"):
        ChatTemplate.from_folder(path, "../rag")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer_config.json: not JSON"),
        ("[1]", "tokenizer_config.json: holds a list, expected a JSON object"),
        ({"chat_template": 3}, "chat_template: expected a string, or a list of objects"),
        ({"chat_template": [{"name": "default"}]}, "chat_template: expected a string, or a list of objects"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "chat_template: expected a string, or a list of objects"),
        ({"chat_template": "x", "bos_token": 3}, "tokenizer_config.json: bos_token: found 3, expected a token's text"),
        ({"chat_template": "{% if %}"}, "chat_template: no template .*line 1"),
        ({"chat_template": "a\n{{ messages"}, "chat_template: no template .*line 2"),
        ({}, "no chat_template.jinja, nor chat_template in tokenizer_config.json; a model that was not trained to chat"),
    ],
)
def test_what_is_no_template(folder, content, message):
    with pytest.raises(FormatError, match=message) as caught:
        ChatTemplate.from_folder(folder(tokenizer_config_dot_json=content))
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_text(tmp_path):
    with pytest.raises(FormatError, match="no such folder"):
        ChatTemplate.from_folder(tmp_path / "absent")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not UTF-8"):
        ChatTemplate.from_folder(tmp_path)


# --- what goes in, and what a template cannot do ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("Hello", TypeError, "messages must be a list of dicts with 'role' and 'content', got str"),
        (HELLO[0], TypeError, "messages must be a list of dicts .*, got dict"),
        (["Hello"], TypeError, r"messages\[0\] must be a dict with 'role' and 'content', got str"),
        ([{"content": "Hello"}], ValueError, r"messages\[0\] must have a 'role', such as 'user', got None"),
        ([{"role": "user", "content": b"x"}], TypeError, r"messages\[0\]\['content'\] must be text, .*, got bytes"),
        ([{"role": "user", "content": [open]}], TypeError, r"messages\[0\]\['content'\]\[0\] must be text"),
    ],
)
def test_what_are_no_messages(messages, error, message):
    with pytest.raises(error, match=message):
        ChatTemplate(CHATML).render(messages)


def test_a_template_that_fails_says_so():
    with pytest.raises(FormatError, match=r"chat template: failed on these messages \(UndefinedError: .*'dict object' has no"):
        ChatTemplate("{{ messages[0].absent.more }}").render(HELLO)
    with pytest.raises(FormatError, match=r"failed on these messages \(ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}").render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% set ns = namespace(a=1) %}{% set ns._b = 2 %}",
        "{{ '{0.__class__.mro}'.format(messages) }}",
        "{% for i in range(1000000) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(FormatError, match="failed on these messages .(SecurityError|UndefinedError|OverflowError)"):
        ChatTemplate(source).render(HELLO)


def test_a_template_gets_a_copy_of_plain_values():
    class Loud(str):
        def shout(self):
            return self.upper()

    messages = ({"role": Loud("user"), "content": ("a", 1, 2.5, True, None)},)
    assert ChatTemplate("{{ messages[0].content }}").render(messages) == "['a', 1, 2.5, True, None]"
    with pytest.raises(FormatError, match="no attribute 'shout'"):
        ChatTemplate("{{ messages[0].role.shout() }}").render(messages)


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.ext", None)
    with pytest.raises(BackendError, match=r"chat templates need the package jinja2: pip install 'cupyq\[chat\]'"):
        ChatTemplate(CHATML)
    monkeypatch.undo()
    import jinja2

    monkeypatch.setattr(jinja2, "__version__", "3.1.4")
    with pytest.raises(BackendError, match="need jinja2 3.1.6 or newer, found 3.1.4"):
        ChatTemplate(CHATML)
