"""Speeder: multimodal LLM recommenders in which an item is one token."""
