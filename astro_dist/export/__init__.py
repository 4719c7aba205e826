"""Assemble the finished model, list its files, describe it and verify it."""
