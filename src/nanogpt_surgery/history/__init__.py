"""The journal of a model and of a folder: undo, redo, and the proof by hash."""
