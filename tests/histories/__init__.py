"""Records what concurrent processes are told of tasks, and looks for one order that explains it."""
