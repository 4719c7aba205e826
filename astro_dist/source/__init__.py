"""Where checkpoints and calibration text come from."""
