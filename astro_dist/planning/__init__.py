"""What a run consists of and what it will need, from the headers alone."""
