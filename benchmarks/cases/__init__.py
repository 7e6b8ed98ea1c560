"""One row of what is promised a module: each has a `CASE`, and its name is what the command line takes."""
