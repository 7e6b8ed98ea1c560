"""Faults, one at a time and everywhere: statements, commits, suspensions, I/O calls, surroundings; each outcome by hand."""
