"""The version, for those who may not import all of `cupyq`; pyproject.toml has it too."""

VERSION = "0.1.0"
