"""What tests share: tiny models, adapters, tokenizers, trainings, and commands run in process."""
