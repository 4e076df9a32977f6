"""Hugging Face's folders: models in and out, tensors and settings, with nothing lost on the way."""
