"""The version of gfcompile, for parts that must not import the whole of it."""

VERSION = "0.1.0"  # as in pyproject.toml
