"""The program, as `python -m optprune.cli` runs it."""

import sys

from optprune.cli import main

sys.exit(main())
