"""The pages of `verify` and `diff`."""
