"""QLLM: channel reassembly and low-rank correction, block by block (Liu et al., ICLR 2024, arXiv 2310.08041)."""
