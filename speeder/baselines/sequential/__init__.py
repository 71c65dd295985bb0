"""Small sequence models over item embeddings: what they share, and the trainer of all of them."""
