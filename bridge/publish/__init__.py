"""Outputs that appear whole, and are accounted for."""
