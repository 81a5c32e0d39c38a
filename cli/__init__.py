"""The command `bridge`: it parses, calls the library and prints."""

import os

if __name__ != "bridge.cli":
    raise ImportError(f"this folder installs as bridge.cli and cannot be imported as {__name__}")

# Steps run side by side, and their matrices are narrow: threads of numpy's BLAS would wait for each
# other longer than they work. It reads this when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
