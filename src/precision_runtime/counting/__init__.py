"""The ledger: which op ran in which dtype, and how much work it was."""
