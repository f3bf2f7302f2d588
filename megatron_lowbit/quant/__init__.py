"""What a quantized linear is: the affine quantizer, reassembly plans, the checkpoint, and rounding to nearest."""
