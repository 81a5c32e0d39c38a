"""From a request to a published output."""
