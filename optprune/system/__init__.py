"""The machine underneath: signals, files, installed packages, and how a value is shown in a sentence."""
