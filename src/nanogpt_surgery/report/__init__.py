"""Pictures of what happened, made from plain data."""
