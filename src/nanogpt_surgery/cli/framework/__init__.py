"""The app, its options and its console."""
