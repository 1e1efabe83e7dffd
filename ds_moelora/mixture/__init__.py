"""The maths of mixtures of LoRA experts, on local tensors. Imports torch alone."""
