"""The arithmetic of low-rank changes."""
