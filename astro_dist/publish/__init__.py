"""Publish a finished model on the Hugging Face Hub."""
