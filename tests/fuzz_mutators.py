"""Mutators that know the files they damage: a case is a folder, {file name: its bytes, or what stands in its place}.

Every choice comes from a random.Random, so a seed repeats a run, and hypothesis, which has one of its own, shrinks a failure.
"""

import json
import os
import random
import shutil
from pathlib import Path

KINDS = ("folder", "loop", "dangling", "fifo", "zeros", "outside")
"""What may stand in place of a file: a folder, symlinks to itself, to nothing, to a device without an end, out of the folder,
and a pipe that nobody writes to."""

Case = dict[str, bytes | str]
MAX_BYTES = 1 << 18
MOST_PLACES = 5000


def write(folder: Path, case: Case) -> None:
    """Make the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "fifo":
            os.mkfifo(path)
        else:
            targets = {"loop": path.name, "dangling": "nothing", "zeros": "/dev/zero", "outside": "/etc/passwd"}
            path.symlink_to(targets[content])


def to_text(case: Case) -> str:
    """A case as JSON; most bytes stand as they are."""
    values = {name: {"kind": c} if isinstance(c, str) else c.decode("latin-1") for name, c in case.items()}
    return json.dumps(values, indent=0)


def from_text(text: str) -> Case:
    return {name: c["kind"] if isinstance(c, dict) else c.encode("latin-1") for name, c in json.loads(text).items()}


# --- JSON -------------------------------------------------------------------------------------------------------------


class Raw(str):
    """Text that stands in the JSON as it is."""


class Pairs(list):
    """An object as (key, value) pairs: a key may come twice."""


INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 255, 1 << 16, 1 << 20, 1 << 24, 2**31 - 1, 2**31)
INTEGERS += (2**32, 2**53 + 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
NUMBERS = (*INTEGERS, 0.0, -0.0, 0.5, 1.5, 1e-320, 5e-324, 1e-30, 1e30, 1e300, 1.7e308, *map(Raw, ("1e999", "-1e999", "NaN")))
NUMBERS += (Raw("Infinity"), Raw("-Infinity"), Raw("9" * 5000), Raw("0." + "1" * 5000), Raw("1" * 4200))
STRINGS = (
    "",
    "a",
    "a" * 5000,
    "\ud800",
    "\0",
    "two\nlines\x1b[31m\u2028",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "ключ",
    "{}",
)
STRINGS += ("(a+)+$", "(.*.*.*.*.*.*.*)*x", "[", "\\1", "(?=a)", "NaN", "null", "x" * 300, "con/../..", "1", "0")
OTHERS = (
    None,
    True,
    False,
    Raw("["),
    Raw(""),
    Raw("[" * 100_000),
    Raw('{"a":' * 100_000),
    Raw("[[],[]," * 999),
    Raw("1" + ",1" * 9999),
)
OTHERS += (
    Raw(f"[{'[' * 500}{']' * 500}]"),
    Raw(f"[{'[' * 90}{']' * 90}]"),
    Raw(f"[{'[' * 970}{']' * 970}]"),
    Raw("[" + ",".join(["0"] * 5000) + "]"),
    Raw('"\\ud800"'),
    Raw("'a'"),
    Raw("\x00"),
)


_MOST_WRITTEN = 10**4000  # Python writes no more digits


def parse(text: str) -> object:
    return json.loads(text, object_pairs_hook=Pairs)


def dump(value: object) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    if isinstance(value, int) and abs(value) > _MOST_WRITTEN:
        return "1" + "0" * 4000
    return json.dumps(value)


def hostile(rng: random.Random, words: list[str]) -> object:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(STRINGS)
    if kind == 4 and words:
        return rng.choice(words)
    if kind == 5:
        return [hostile(rng, words) for _ in range(rng.randrange(4))]
    if kind == 6:
        return Pairs((key(rng, words), hostile(rng, words)) for _ in range(rng.randrange(4)))
    return rng.choice(OTHERS)


def key(rng: random.Random, words: list[str]) -> str:
    return rng.choice(words) if words and rng.random() < 0.8 else rng.choice(STRINGS)


def slots(value: object) -> list[tuple[list, int]]:
    """(list, index) of everything in a tree of lists and Pairs, up to some thousands."""
    found: list[tuple[list, int]] = []
    todo = [value]
    while todo and len(found) < MOST_PLACES:
        item = todo.pop()
        if isinstance(item, list):
            for index, inner in enumerate(item):
                found.append((item, index))
                todo.append(inner[1] if isinstance(item, Pairs) else inner)
    return found


def get(place: tuple[list, int]) -> object:
    holder, index = place
    return holder[index][1] if isinstance(holder, Pairs) else holder[index]


def put(place: tuple[list, int], value: object) -> None:
    holder, index = place
    holder[index] = (holder[index][0], value) if isinstance(holder, Pairs) else value


def near(value: object, rng: random.Random, words: list[str]) -> object:
    """A value that is much like this one."""
    if isinstance(value, bool) or value is None:
        return rng.choice((None, True, False, 0, 1))
    if isinstance(value, (int, float)):
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, float(value) + 0.5, str(value), [value], value * 32)
        )
    if isinstance(value, Raw):
        return value
    if isinstance(value, str) and len(value) < 50_000:
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at], value + value, value[:at] + rng.choice(STRINGS) + value[at:], value.upper(), [value]))
    if isinstance(value, list):
        kind, times = type(value), 50 if len(slots(value)) < 50 else 2 if len(slots(value)) < MOST_PLACES else 1
        return rng.choice((kind(), kind(value[1:]), kind(value * times), kind(reversed(value)), len(value)))
    return hostile(rng, words)


def mutate_tree(tree: object, rng: random.Random, words: list[str]) -> object:
    """One change of a parsed JSON text, in place where it can be."""
    places = slots(tree)
    if not places or rng.random() < 0.01:
        return hostile(rng, words)
    place = rng.choice(places)
    holder, index = place
    kind = rng.randrange(10)
    if kind < 3:
        put(place, hostile(rng, words))
    elif kind < 6:
        put(place, near(get(place), rng, words))
    elif kind == 6:
        del holder[index]
    elif kind == 7:
        put(place, get(rng.choice(places)))
    elif isinstance(holder, Pairs):
        if kind == 8:
            holder[index] = (key(rng, words), holder[index][1])
        else:
            name = holder[index][0] if rng.random() < 0.3 else key(rng, words)
            holder.insert(rng.randrange(len(holder) + 1), (name, hostile(rng, words)))
    else:
        holder.insert(index, hostile(rng, words))
    return tree


def mutate_json(content: bytes, rng: random.Random, words: list[str]) -> bytes:
    tree = parse(content.decode("utf-8-sig"))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = mutate_tree(tree, rng, words)
        if isinstance(tree, Raw):
            break
    return dump(tree).encode("utf-8", "surrogatepass")


def mutate_lines(content: bytes, rng: random.Random, words: list[str]) -> bytes:
    """JSON lines."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at] or b'{"text": ""}', rng, words)
    return b"\n".join(lines)


# --- bytes and text ---------------------------------------------------------------------------------------------------

BYTES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
)
BYTES += (b"\xc3", b"\xf4\x90\x80\x80", b"-", b"9" * 40, b"a" * 4096, b"\n" * 4096, b"(" * 999, b"\0" * 64, b"\xe2\x80\xa8")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(content) + 1)
    end = min(len(content), begin + rng.choice((0, 1, 2, 8, 64, 4096)))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:begin]
    if kind == 1:
        return content[:begin] + content[end:]
    if kind == 2:
        return content[:begin] + rng.choice(BYTES) + content[begin:]
    if kind == 3:
        return content[:end] + content[begin:end] * rng.choice((1, 2, 50)) + content[end:]
    if kind == 4 and content:
        at = min(begin, len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content[:begin] + bytes(rng.randrange(256) for _ in range(end - begin)) + content[end:]


TEMPLATE = (
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{{ 'a' * 99999999999 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set a = 'a' * 10 ** 11 %}",
    "\ud800",
)
TEMPLATE += (
    "{{ 'a'|center(99999999999) }}",
    "{{ '%99999999999d' % 1 }}",
    "{% if 9 ** (9 ** 9) %}{% endif %}",
    "{{ " + "(" * 500,
)
TEMPLATE += (
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "{% macro a(b) %}{% endmacro %}",
    "{% extends 'x' %}",
    "{% include 'x' %}",
)
TEMPLATE += (
    "{{ a.b[c](d)|e(f=g) is h }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{{ 1" + "+1" * 900 + " }}",
)
TEMPLATE += (
    "{{ " + "9" * 5000 + " }}",
    "{{ [1]" + "[0]" * 900 + " }}",
    "{% set __x__ = 1 %}",
    "{{ ''.__class__ }}",
    "{% raw %}",
)
TEMPLATE += (
    "{{ 1e999 }}",
    "{{ 1/0 }}",
    "{{ " + "not " * 900 + "a }}",
    "{% if a %}" * 200,
    "{% call a() %}",
    "{% autoescape 1 %}",
)
TEMPLATE += (
    "{% from 'a' import b %}",
    "{% block a %}{% endblock %}" * 2,
    "{% filter upper %}",
    "{{ range(10 ** 9)|list }}",
    "\0",
)


def mutate_template(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    begin = rng.randrange(len(content) + 1)
    end = begin if rng.random() < 0.5 else min(len(content), begin + rng.choice((1, 8, 64)))
    return content[:begin] + rng.choice(TEMPLATE).encode("utf-8", "surrogatepass") + content[end:]


# --- safetensors ------------------------------------------------------------------------------------------------------

SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
}


def split_safetensors(content: bytes) -> tuple[object, bytes]:
    """(header, data)."""
    length = int.from_bytes(content[:8], "little")
    return parse(content[8 : 8 + length].decode()), content[8 + length :]


def join_safetensors(header: object, data: bytes) -> bytes:
    raw = dump(header).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def tensors_of(header: Pairs, data: bytes) -> list[tuple[str, str, list[int], bytes]]:
    found = []
    for name, entry in header:
        if name != "__metadata__":
            entry = dict(entry)
            begin, end = entry["data_offsets"]
            found.append((name, entry["dtype"], list(entry["shape"]), data[begin:end]))
    return found


def file_of(tensors: list[tuple[str, str, list[int], bytes]], metadata: list = ()) -> bytes:
    """A well-formed file of these tensors."""
    header, data = Pairs(metadata), b""
    for name, dtype, shape, content in tensors:
        offsets = [len(data), len(data) + len(content)]
        header.append((name, Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", offsets)])))
        data += content
    return join_safetensors(header, data)


def mutate_tensors(tensors: list, rng: random.Random, words: list[str]) -> list:
    """One change that leaves the file well formed: of names, dtypes, shapes or values."""
    if not tensors:
        return tensors
    at = rng.randrange(len(tensors))
    name, dtype, shape, content = tensors[at]
    kind = rng.randrange(8)
    if kind == 0:
        return tensors[:at] + tensors[at + 1 :]
    if kind == 1:
        name = rng.choice(
            (
                rng.choice(tensors)[0],
                name + rng.choice(STRINGS),
                key(rng, words),
                name.rpartition(".")[0] + "." + key(rng, words),
            )
        )
        if any(other[0] == name for other in tensors):
            name += "2"
    elif kind == 2:
        dtype = rng.choice([other for other in SIZES if SIZES[other] == SIZES.get(dtype, 1)])
    elif kind == 3:
        dtype = rng.choice(list(SIZES))
        content = resized(content, shape, dtype, rng)
    elif kind == 4:
        shape = list(shape)
        if shape and rng.random() < 0.8:
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 96, 256))
        else:
            shape = rng.choice(([], [0], [1], [1, *shape], [*shape, 1], [0, 2**61], shape[::-1], [1] * 32, shape[:-1]))
        content = resized(content, shape, dtype, rng)
    elif kind == 5:
        content = bytes(len(content)) if rng.random() < 0.5 else b"\xff" * len(content)
    elif kind == 6 and content:
        word = rng.choice((b"\x00\x7c", b"\xff\xff", b"\x00\x80", b"\x01\x00", b"\x00\x00\xc0\x7f", rng.randbytes(4)))
        begin = rng.randrange(len(content))
        content = (content[:begin] + word + content[begin + len(word) :])[: len(content)]
    else:
        content = rng.randbytes(len(content))
    return [*tensors[:at], (name, dtype, shape, content), *tensors[at + 1 :]]


def resized(content: bytes, shape: list[int], dtype: str, rng: random.Random) -> bytes:
    count = SIZES[dtype]
    for size in shape:
        count *= size
    if not 0 <= count <= MAX_BYTES:
        shape[:] = [0]
        count = 0
    return (content * (count // max(len(content), 1) + 1))[:count] if content else rng.randbytes(count)


def mutate_safetensors(content: bytes, rng: random.Random, words: list[str]) -> bytes:
    if rng.random() < 0.15:
        return mutate_bytes(content, rng)
    header, data = split_safetensors(content)
    if rng.random() < 0.4:
        return join_safetensors(mutate_tree(header, rng, words), data)
    metadata = [pair for pair in header if pair[0] == "__metadata__"]
    tensors = tensors_of(header, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tensors = mutate_tensors(tensors, rng, words)
    return file_of(tensors, metadata)


# --- cases ------------------------------------------------------------------------------------------------------------


_IMPOSSIBLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""What a change raises that cannot be made to a file as damaged as this one: then its bytes are changed."""


def mutate(case: Case, rng: random.Random, words: list[str], other: Case | None = None) -> Case:
    """A case with a few changes; `other`: one whose files may be taken."""
    case = dict(case)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(list(case))
        chance = rng.random()
        if chance < 0.02:
            case[name] = rng.choice(KINDS)
            continue
        if chance < 0.04 and len(case) > 1:
            del case[name]
            continue
        if chance < 0.1 and other is not None and name in other:
            case[name] = other[name]
        content = case[name]
        if isinstance(content, bytes):
            try:
                content = mutated(name, content, rng, words)
            except _IMPOSSIBLE:
                content = mutate_bytes(content, rng)
            case[name] = content[:MAX_BYTES]
    return case


def mutated(name: str, content: bytes, rng: random.Random, words: list[str]) -> bytes:
    """The content of a file, by its name."""
    if rng.random() < 0.1:
        return mutate_bytes(content, rng)
    ending = name.rpartition(".")[2]
    if ending == "json":
        return mutate_json(content, rng, words)
    if ending == "jsonl":
        return mutate_lines(content, rng, words)
    if ending == "jinja":
        return mutate_template(content, rng)
    if ending == "safetensors":
        return mutate_safetensors(content, rng, words)
    return mutate_bytes(content, rng)
