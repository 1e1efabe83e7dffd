"""The optimizers. They know pairs of tagged parameters, and neither adapters nor PEFT."""
