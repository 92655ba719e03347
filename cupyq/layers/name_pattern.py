"""Names of modules and the regular expressions for them in an adapter's settings, matched in bounded time.

Python's `re` takes exponential time on some expressions, and these come from a file. The part of the language that settings of
PEFT use is read here: characters, `.`, classes such as [0-9], escapes such as \\d and \\., groups with alternatives, and * + ?
behind any of them. All ways through an expression are followed at once (Thompson, Regular Expression Search Algorithm, 1968):
a match takes at most the length of the name times that of the expression.
"""

import re
from collections.abc import Iterable
from typing import NoReturn

MOST_CHARACTERS = 500
"""Of an expression, and of a name."""
_LITERAL = re.compile(r"(?:[\w-]|\\?\.)*", re.ASCII)
_ATOM = re.compile(r"\\[dwsDWS]|\\[^a-zA-Z0-9]|\[\^?(?:\\.|[^\[\]\\])+\]|[^\\()\[\]{}|*+?^$]")


class NamePattern:
    """An expression that a whole name matches, or its end after a dot."""

    def __init__(self, text: str):
        """ValueError for what is no expression, or has what is not read here."""
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"{len(text)} characters, expected at most {MOST_CHARACTERS}")
        # Without repetition or choice, `re` has one way to go from each dot.
        self._literal = re.compile(rf"(?:.*\.)?(?:{text})$") if _LITERAL.fullmatch(text) else None
        self.cost = 1 if self._literal else 20 * len(text)
        """Of a match, for each character of the name; measured in what a plain name takes."""
        if self._literal:
            return
        self._text, self._at = text, 0
        # State -> the states that are reached with it, anywhere or at one end of the name alone; state -> what the next
        # character must be, and the state behind it.
        self._beside: list[list[int]] = []
        self._at_ends: dict[int, tuple[str, int]] = {}
        self._steps: dict[int, tuple[re.Pattern[str], int]] = {}
        self._begin = self._state()
        self._end = self._alternatives(self._begin, 0)
        if self._at < len(self._text):
            self._refuse()

    def matches(self, name: str) -> bool:
        """Whether `re.match(rf"(.*\\.)?({text})$", name)` would find a match; ValueError for a name that is too long."""
        if len(name) > MOST_CHARACTERS:
            raise ValueError(f"a name of {len(name)} characters, expected at most {MOST_CHARACTERS}")
        if self._literal is not None:
            return self._literal.match(name) is not None
        behind_dot, states = self._with_beside([self._begin]), self._with_beside([self._begin], "^" if name else "^$")
        for index, character in enumerate(name, 1):
            reached = [self._steps[s][1] for s in states if s in self._steps and self._steps[s][0].match(character)]
            if character == ".":
                reached += behind_dot
            states = self._with_beside(reached, "$" if index == len(name) else "")
        return self._end in states

    def _with_beside(self, states: Iterable[int], ends: str = "") -> set[int]:
        found, todo = set(states), list(states)
        while todo:
            last = todo.pop()
            anchor, behind = self._at_ends.get(last, ("", last))
            for state in [*self._beside[last], *([behind] if anchor in ends else [])]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return found

    # --- reading: each takes the state that its part begins at and returns the one it ends at ---

    def _state(self) -> int:
        self._beside.append([])
        return len(self._beside) - 1

    def _take(self, characters: str) -> str:
        """The next character, if it is one of these."""
        found = self._text[self._at : self._at + 1]
        if not found or found not in characters:
            return ""
        self._at += 1
        return found

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self._text[self._at : self._at + 20]!r} at character {self._at} is not read here")

    def _alternatives(self, begin: int, depth: int) -> int:
        end = self._state()
        while True:
            self._beside[self._sequence(begin, depth)].append(end)
            if not self._take("|"):
                return end

    def _sequence(self, begin: int, depth: int) -> int:
        start = self._state()
        self._beside[begin].append(start)
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            start = self._repeated(start, depth)
        return start

    def _repeated(self, begin: int, depth: int) -> int:
        inner = self._state()
        self._beside[begin].append(inner)
        last = self._item(inner, depth)
        end = self._state()
        self._beside[last].append(end)
        repeat = self._take("*+?")
        if repeat:
            self._take("?")  # to take as few as will do changes nothing about whether there is a match
        if repeat in ("*", "+"):
            self._beside[last].append(inner)
        if repeat in ("*", "?"):
            self._beside[begin].append(end)
        return end

    def _item(self, begin: int, depth: int) -> int:
        if self._take("("):
            if depth > 20 or (self._take("?") and not self._take(":")):
                self._refuse()
            end = self._alternatives(begin, depth + 1)
            if not self._take(")"):
                self._refuse()
            return end
        anchor = self._take("^$")
        if anchor:
            self._at_ends[begin] = anchor, self._state()
            return self._at_ends[begin][1]
        atom = _ATOM.match(self._text, self._at)
        if atom is None:
            self._refuse()
        try:
            test = re.compile(atom[0])
        except re.error as error:
            raise ValueError(f"{atom[0]!r}: {error}") from None
        self._at = atom.end()
        end = self._state()
        self._steps[begin] = (test, end)
        return end
