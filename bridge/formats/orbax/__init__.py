"""Orbax checkpoints: OCDBT, zarr, zstd, read and written without Orbax."""
