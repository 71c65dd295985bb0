"""`SpeederForCausalLM`: an item is one token."""
