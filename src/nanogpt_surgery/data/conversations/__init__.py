"""Chat templates, instruction records, and the answers that are trained on."""
