"""The version of optprune, from which the package metadata takes it."""

VERSION = "0.2.0.dev0"
