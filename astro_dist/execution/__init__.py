"""The execution of a run: workers, and the driver that gives calls to them."""
