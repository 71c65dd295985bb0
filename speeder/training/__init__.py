"""A recipe's stages, run one after another."""
