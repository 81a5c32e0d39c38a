"""Files and directories: where they lie, how they are read, whether they changed."""
