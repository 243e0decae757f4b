"""``python -m unigen`` is ``unigen``."""

import sys

from unigen.cli import main

if __name__ == "__main__":
    sys.exit(main())
