"""What a training takes in memory and time, before it runs."""
