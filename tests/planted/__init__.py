"""Plants faults in a copy of the package, one at a time, and sees that the harnesses find each."""
