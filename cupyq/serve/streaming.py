"""From tokens to the text that may be told: what might become a stop string or a banned one is held back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupyq.generate.text import StreamDecoder


@dataclass
class _Held:
    token: int
    piece: str
    extra: Any
    """Whatever the caller wants back with the token."""
    decoder: StreamDecoder | None
    """As it was before the token, where that may be asked for."""


@dataclass(frozen=True)
class Told:
    """What became of a token: `tokens` and `extras` to be told with `text`; or one of the ends below."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    extras: tuple[Any, ...] = ()
    is_stopped: bool = False
    """A stop string is complete; the text ends before it."""
    rewind: tuple[int, int] | None = None
    """(n, token): a banned string is complete. The last n tokens are void, and `token`, the first of them, must not come."""


class TextStream:
    """Tokens one by one, text when it is certain; see `Told`. Without a tokenizer each token is told at once.

    A UTF-8 character is never split. Tokens are told whole: from the token on in which a stop or banned string may begin,
    all wait until the string is complete or cannot be any more. `heal` characters at the start are the prompt's.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = (), banned: Sequence[str] = (), heal: int = 0
    ):
        self._stop, self._banned = tuple(stop), tuple(fold(text) for text in banned)
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, prompt)
        self._heal = heal
        self._held: list[_Held] = []

    @property
    def held(self) -> int:
        """Tokens that were not told yet."""
        return len(self._held)

    def add(self, token: int, extra: Any = None) -> Told:
        if self._decoder is None:
            return Told((token,), "", (extra,))
        before = self._decoder.copy() if self._banned else None
        self._held.append(_Held(token, self._decoder.add(token), extra, before))
        return self._decide()

    def finish(self) -> Told:
        """All that is held, bytes that never became a character as replacement characters."""
        if self._decoder is not None:
            rest = self._decoder.finish()
            if self._held:
                self._held[-1].piece += rest
                for text in self._stop:
                    if text in self._text():
                        return self._stopped()
            elif rest:
                return Told((), self._healed(rest), ())
        return self._tell(len(self._held))

    def _text(self) -> str:
        return "".join(held.piece for held in self._held)

    def _decide(self) -> Told:
        text = self._text()
        folded = fold(text) if self._banned else ""
        stops = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        banned = [at for at in (folded.find(text) for text in self._banned) if at >= 0]
        if banned and (not stops or min(banned) <= min(stops)):
            return self._rewound(min(banned))
        if stops:
            return self._stopped()
        begins = [len(text)]
        begins += [len(text) - overlap(text, stop) for stop in self._stop]
        begins += [len(text) - overlap(folded, banned) for banned in self._banned]
        return self._tell(self._whole_before(min(begins), len(text)))

    def _whole_before(self, begin: int, end: int) -> int:
        """How many of the held tokens end by character `begin`; where nothing is suspect, `begin` being the end, all.

        Where strings are looked for, tokens without text wait for the character that they are the first bytes of.
        """
        count = len(self._held)
        if begin < end:
            at = count = 0
            for held in self._held:
                at += len(held.piece)
                if at > begin:
                    break
                count += 1
        if self._banned or self._stop:
            while count and not self._held[count - 1].piece:
                count -= 1
        return count

    def _rewound(self, at: int) -> Told:
        """Back to before the first token of the text from character `at` on."""
        index, end = 0, len(self._held[0].piece)
        while end <= at:
            index += 1
            end += len(self._held[index].piece)
        while index and not self._held[index - 1].piece:
            index -= 1  # the first bytes of its first character
        void = self._held[index:]
        self._held = self._held[:index]
        self._decoder = void[0].decoder
        return Told(rewind=(len(void), void[0].token))

    def _stopped(self) -> Told:
        text = self._text()
        end = min(at for at in (text.find(stop) for stop in self._stop) if at >= 0)
        at = count = 0
        for held in self._held:
            if at >= end:
                break
            at += len(held.piece)
            count += 1
        kept, self._held = self._held[:count], []
        tokens, extras = tuple(held.token for held in kept), tuple(held.extra for held in kept)
        return Told(tokens, self._healed(text[:end]), extras, is_stopped=True)

    def _tell(self, count: int) -> Told:
        told, self._held = self._held[:count], self._held[count:]
        text = self._healed("".join(held.piece for held in told))
        return Told(tuple(held.token for held in told), text, tuple(held.extra for held in told))

    def _healed(self, text: str) -> str:
        cut = min(self._heal, len(text))
        self._heal -= cut
        return text[cut:]


def fold(text: str) -> str:
    """Lower case, character by character, so that places stay what they are."""
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)


def overlap(text: str, wanted: str) -> int:
    """The most characters, fewer than all, that `wanted` can begin with at the end of `text`.

    >>> overlap("say no", "nothing")
    2
    """
    for length in range(min(len(text), len(wanted) - 1), 0, -1):
        if text.endswith(wanted[:length]):
            return length
    return 0
