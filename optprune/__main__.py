"""The program, as `python -m optprune` runs it."""

import sys

from optprune.cli import main

sys.exit(main())
