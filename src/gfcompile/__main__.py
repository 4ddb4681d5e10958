"""`python -m gfcompile` is the `gfcompile` command."""

import sys

from gfcompile.compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
