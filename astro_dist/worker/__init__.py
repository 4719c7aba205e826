"""What one worker does on one device."""
