"""The embedded model: a Llama of 1.3 M parameters, trained on Python's own source (launch/tools/train_embedded.py)."""
