"""What a 1.58-bit model is: ternary weights, layers, packing and storage."""
