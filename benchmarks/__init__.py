"""What the ops are compared with, and how far they are from the machine's limits: `make bench`."""
