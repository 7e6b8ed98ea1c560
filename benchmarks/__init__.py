"""Owns the measurements: ratios against what a user would write instead, in the same run."""
