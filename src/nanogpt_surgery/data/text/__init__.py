"""Text from files and folders, prepared token files, mixtures."""
