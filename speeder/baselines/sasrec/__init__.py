"""SASRec with cross-entropy over the whole catalogue: the sequential baseline."""
