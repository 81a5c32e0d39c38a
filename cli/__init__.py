"""The command `bridge`: it parses, calls the library and prints."""

if __name__ != "bridge.cli":
    raise ImportError(f"this folder installs as bridge.cli and cannot be imported as {__name__}")
