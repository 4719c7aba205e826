"""What must survive: the files of a run and their records."""
