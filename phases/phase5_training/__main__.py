"""``python -m phase5_training`` is the ``forge`` command."""

import sys

from phase5_training.cli import main

if __name__ == "__main__":
    sys.exit(main())
