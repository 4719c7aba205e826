"""Where and when: configuration, plan, workers, executors and the run."""
