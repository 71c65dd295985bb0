"""`speeder report`: a run folder as one page that loads no other file; see `build.py`."""
