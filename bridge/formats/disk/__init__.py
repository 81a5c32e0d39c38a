"""Local files and buckets: locations, readahead, write-behind, detection of changes."""
