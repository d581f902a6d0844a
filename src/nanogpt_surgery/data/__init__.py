"""From text to ids to windows."""
