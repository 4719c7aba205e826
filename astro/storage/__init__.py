"""Files of one process: written atomically, read by ranges, checked against what was written."""
