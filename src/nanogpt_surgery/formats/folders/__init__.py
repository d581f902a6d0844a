"""Run folders, and operations on model folders on disk."""
