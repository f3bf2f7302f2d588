"""The embedded model: a 1.3 M parameter Llama trained on the Python standard library (launch/train_embedded.py)."""
