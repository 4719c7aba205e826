"""What a person is told of a run: progress, status, summary, report."""
