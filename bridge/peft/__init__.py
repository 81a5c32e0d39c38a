"""What PEFT's files mean."""
