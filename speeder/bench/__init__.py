"""`speeder bench`: Speeder beside language models that read items as text, on one machine in one run."""
