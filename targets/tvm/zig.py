"""Zig's C compiler and linker, which bring whatever they need in one pip package."""

import subprocess
import sys
from pathlib import Path

from gfcompile.runtime.errors import CompileError


def zig(*arguments: str, folder: Path | None = None) -> None:
    """Runs `zig` with `arguments`, in `folder` if one is given.

    Raises:
        CompileError: it refuses; the first error is in the message.
    """
    result = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else "?")
        raise CompileError(f"the C compiler (ziglang) failed: {reason.strip()}")
