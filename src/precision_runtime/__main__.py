"""``python -m precision_runtime``: the command line of the interpreter that runs it, found on the path or not."""

import sys

from precision_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
