"""`python -m speeder.cli`, as launchers such as torchrun start it."""

import sys

from speeder.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
