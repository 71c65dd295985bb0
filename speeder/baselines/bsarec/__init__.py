"""BSARec with cross-entropy over the whole catalogue: self-attention beside a low-pass filter."""
