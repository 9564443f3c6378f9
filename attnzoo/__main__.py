"""python -m attnzoo: the same as the command attnzoo."""

import sys

from attnzoo.commands.program import main

if __name__ == "__main__":
    sys.exit(main())
