"""A loaded model on its engine: Hugging Face, DeepSpeed or Megatron-Core."""
