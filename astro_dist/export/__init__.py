"""The finished model: assembled, listed, described, verified."""
