"""Who does what next: pure state machines that load no torch."""
