"""What bridge knows of each model family: plugins of rules and facts, without I/O."""

if __name__ != "bridge.adapters":
    raise ImportError(f"this folder installs as bridge.adapters and cannot be imported as {__name__}")
