"""What a quantized checkpoint says of itself in its header; read without torch."""

from pathlib import Path

from gfcompile.runtime.errors import UserError

__all__ = ["KEY", "is_quantized", "read_header"]

KEY = "gfcompile.quantized"


def is_quantized(path: Path) -> bool:
    """Whether `path` is a quantized checkpoint.

    Raises:
        UserError: there is no such file.
    """
    return read_header(path) is not None


def read_header(path: Path) -> str | None:
    """The JSON in a quantized checkpoint's metadata; None if the file is something else.

    Raises:
        UserError: there is no such file.
    """
    import safetensors

    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such checkpoint'}")
    try:
        with safetensors.safe_open(path, "np") as file:
            header: str | None = (file.metadata() or {}).get(KEY)
            return header
    except (safetensors.SafetensorError, OSError):
        return None
