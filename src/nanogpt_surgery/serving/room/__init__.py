"""What the page in the browser asks for: JSON below `/api/`."""
