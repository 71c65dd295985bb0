"""Training: runs a recipe's stages one after another."""
