"""One loop for pretraining and fine-tuning, and the folders it goes on from."""
