"""Atomic publication of outputs, and their records."""
