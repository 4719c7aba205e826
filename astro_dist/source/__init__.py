"""Find and read checkpoints and calibration text."""
