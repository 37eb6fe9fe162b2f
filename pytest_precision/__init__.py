"""A pytest plugin that runs tests in several precisions and judges them against FP64. See ``plugin`` for the hooks."""
