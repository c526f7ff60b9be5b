"""Configuration: defaults of all keys, reading of files."""
