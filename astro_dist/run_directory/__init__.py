"""The run directory: the files of a run that must survive, and their records."""
