"""The surgery: low-rank updates of a network's layers. Knows nn.Linear, and no model."""
