"""Containers on disk: plug-ins that list, read and write arrays, and know nothing of models."""
