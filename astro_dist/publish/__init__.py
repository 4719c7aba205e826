"""The upload to the Hugging Face Hub."""
