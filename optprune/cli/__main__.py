"""The entry point of `python -m optprune.cli`."""

import sys

from optprune.cli import main

sys.exit(main())
