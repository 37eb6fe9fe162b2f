"""What a run says about its lanes: rows from the tests' reports, demands on the run, and the terminal's summary."""
