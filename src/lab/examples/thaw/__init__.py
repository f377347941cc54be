"""Fine-tuning with a part of the model frozen at first, then unfrozen at a given step."""
