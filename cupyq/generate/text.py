"""Text to tokens and back, by the `tokenizers` library and a model folder's tokenizer.json."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cupyq.errors import FormatError
from cupyq.models.sampler import SamplerSettings

_MOST_BYTES = 256 << 20  # of a tokenizer.json; those of 262144 tokens have 33 MiB
_REPLACEMENT = "\ufffd"  # what decoders put in place of bytes that are no complete UTF-8 character


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a model folder. FormatError where tokenizer.json is missing or cannot be read."""
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.parent.is_dir():
        raise FormatError(f"{path.parent}: no such folder; name the folder that holds the model's config.json")
    if not path.is_file():
        raise FormatError(
            f"{path}: missing; copy it from the original model, or pass token ids (--tokens 1,2,3) instead of text"
        )
    if path.stat().st_size > _MOST_BYTES:
        raise FormatError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, which no tokenizer is; copy it again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception; its panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300]
        raise FormatError(f"{path}: not a tokenizer ({reason}); copy it again from the original model") from None
    # Files of some models ask for a fixed length, which training needs and inference does not.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text; `special` adds what the tokenizer puts round a prompt, such as a start token."""
    return list(tokenizer.encode(text, add_special_tokens=special).ids)


def tokens_containing(tokenizer: Any, characters: str) -> list[int]:
    """Ids of the tokens whose text has one of the characters, and of all special tokens."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = {index for index in range(tokenizer.get_vocab_size()) if set(tokenizer.decode([index])) & set(characters)}
    return sorted(special | found)


def with_special_tokens(settings: SamplerSettings, tokenizer: Any) -> SamplerSettings:
    """The settings with exllamav2's choice of dry_breakers and xtc_protected, where these are wanted and none are given.

    Punctuation, brackets, quotes, newlines and special tokens end a repetition; XTC leaves newlines and special tokens.
    """
    if settings.dry_multiplier > 0 and not settings.dry_breakers:
        settings = dataclasses.replace(settings, dry_breakers=tokens_containing(tokenizer, '.,!?<>[](){}\n\t"'))
    if settings.xtc_probability > 0 and not settings.xtc_protected:
        settings = dataclasses.replace(settings, xtc_protected=tokens_containing(tokenizer, "\n"))
    return settings


class StreamDecoder:
    """Tokens in, text out, one step at a time.

    `add(token)` returns the text that has become certain, often one token's, or "" while the bytes of a character are
    still incomplete: a UTF-8 character is never split. `finish()` returns what is left. The pieces joined are the decoded
    text. Only a short window of tokens is decoded at each step, so a step's cost does not grow with the text.
    `prompt` are the tokens before the first one: they are not returned, but decoders that strip the space in front of
    the first word need to know that the text does not start here. Special tokens decode to nothing.
    """

    _LONGEST_WINDOW = 32
    _CONTEXT = 8  # tokens kept where no clean place to cut was found: more than a character has bytes

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # The window starts where the text of its tokens stands alone: cut inside a character, sentencepiece decoders turn
        # a whole run of byte tokens into replacement characters.
        self._window: list[int] = []
        self._clean = 0  # tokens of the window before the last place where no character was incomplete
        self._shown = 0  # characters of the window's text that were returned
        for length in range(1, min(len(prompt), 2 * self._CONTEXT) + 1):
            window = [int(token) for token in prompt[-length:]]
            certain = self._decode(window).rstrip(_REPLACEMENT)
            if certain and _REPLACEMENT not in certain:
                self._window, self._shown = window, len(certain)
                break

    def copy(self) -> "StreamDecoder":
        """One that goes on from here by itself."""
        twin = copy.copy(self)
        twin._window = list(self._window)
        return twin

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Text that this token completes."""
        self._window.append(int(token))
        text = self._decode(self._window)
        # Replacement characters at the end may yet become a character; in a window this long most of them never will.
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        is_full = len(self._window) >= self._LONGEST_WINDOW
        end = max(len(text) - (min(held, 3) if is_full else held), self._shown)
        piece, self._shown = text[self._shown : end], end
        if piece and not held:
            self._shorten(self._clean, unshown=0)
        elif is_full:
            self._shorten(len(self._window) - self._CONTEXT, unshown=len(text) - end)
        return piece

    def _shorten(self, start: int, unshown: int) -> None:
        self._window = self._window[start:]
        self._clean = len(self._window)
        self._shown = max(len(self._decode(self._window)) - unshown, 0)

    def finish(self) -> str:
        """The rest: replacement characters for bytes that never became a character, mostly nothing."""
        piece = self._decode(self._window)[self._shown :]
        self._shown += len(piece)
        return piece
