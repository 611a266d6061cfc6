"""Services of the operating system and text output: signals, files, work folders, environment, wording, tables."""
