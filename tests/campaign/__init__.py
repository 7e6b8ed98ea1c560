"""Kills processes that work on one file, at random and at named points, and holds the file against what they were told."""
