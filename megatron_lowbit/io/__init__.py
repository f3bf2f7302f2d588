"""Files, texts and tensors: everything that is read from disk or written to it, and checked on the way."""
