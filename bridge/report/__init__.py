"""HTML reports of `verify` and `diff`."""
