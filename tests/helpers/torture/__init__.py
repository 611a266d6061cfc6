"""Torture: malformed inputs, kills and damaged runs for the commands, and what counts as a fault of theirs."""
