"""Lets one process live long beside others that die every few seconds, and says by numbers whether what it uses stays flat."""
