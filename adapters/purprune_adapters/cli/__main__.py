"""``python -m purprune_adapters.cli``."""

import sys

from purprune_adapters.cli import main

if __name__ == "__main__":
    sys.exit(main())
