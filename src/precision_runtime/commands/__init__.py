"""The subcommands of ``precision-runtime``, one file each: its name is the command's.

A file has ``SUMMARY`` (a line for the list of commands), ``DESCRIPTION`` and ``EXAMPLES`` (for its own help),
``arguments(parser)``, which declares them, and ``run(options)``, which returns the exit status. Importing a file
imports no torch: help must come at once.
"""
