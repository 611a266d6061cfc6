"""So that `python -m optprune` runs the program."""

import sys

from optprune.cli import main

sys.exit(main())
