"""What may go wrong from outside, done on purpose: `python -m tests.faults` prints what survived."""
