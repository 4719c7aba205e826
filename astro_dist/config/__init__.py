"""What one whole run is, and the YAML file that says so."""
