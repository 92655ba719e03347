"""The exceptions cupyq raises on purpose. Each message names what was found, what was expected, and the mend."""

_MOST_CHARACTERS = 2000


class CupyqError(Exception):
    """Base of every cupyq exception."""


class _AboutFiles(CupyqError, ValueError):
    """Its message, which may quote a file, becomes one line of bounded length that cannot steer a terminal."""

    def __init__(self, *arguments: object):
        super().__init__(*(_one_line(argument) if isinstance(argument, str) else argument for argument in arguments))


class FormatError(_AboutFiles):
    """A file, tensor or configuration does not have the form its format defines."""


class UnsupportedError(_AboutFiles):
    """Well-formed input that cupyq (or this GPU) does not handle, such as an unknown architecture."""


class BackendError(CupyqError, RuntimeError):
    """The machine lacks something: a GPU, CuPy, NVRTC, a writable cache folder."""


def _one_line(text: str) -> str:
    if len(text) > _MOST_CHARACTERS:  # the file is named at the start, what to do at the end
        text = f"{text[: _MOST_CHARACTERS - 500]} ... {text[-400:]}"
    if not text.isprintable():
        text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text
