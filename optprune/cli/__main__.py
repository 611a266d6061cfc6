"""So that `python -m optprune.cli` runs the program."""

import sys

from optprune.cli import main

sys.exit(main())
