"""The plan: what ``setup`` would do to a model, and what that would cost its values."""
