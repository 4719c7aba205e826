"""The reports of a run for people: progress, status, summary and an HTML page."""
