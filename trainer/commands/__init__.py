"""The commands of `spoke`, one file each: `run(args)` gives the exit code."""
