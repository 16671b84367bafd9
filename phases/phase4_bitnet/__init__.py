"""What a 1.58-bit model is: layers, packing, reference architectures, the session store."""
