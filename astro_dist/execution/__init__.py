"""Workers and the driver that hands them calls."""
