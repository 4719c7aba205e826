"""Statistics of a layer's inputs on the calibration text."""
