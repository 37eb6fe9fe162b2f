"""A pytest plugin that judges numerical trust in low precision; ``plugin`` is the entry point."""

FIXTURE = "precision_ctx"  # the fixture's name, here so that imports run in one direction
