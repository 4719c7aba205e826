"""The schedules, which decide who does what next. They are pure state machines and load no torch."""
