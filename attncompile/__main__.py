"""``python -m attncompile`` is the command line."""

import sys

from attncompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
