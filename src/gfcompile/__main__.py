"""`python -m gfcompile` is the `gfcompile` command."""

import sys

from gfcompile.compile.cli import main

if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # raised in a library's own clean-up, past the command's handler
        print("gfcompile: interrupted; nothing was written", file=sys.stderr)
        code = 130
    sys.exit(code)
