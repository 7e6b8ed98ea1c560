"""Tells the stories of the model of sessions at length, and counts what was seen in them."""
