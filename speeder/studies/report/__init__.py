"""`speeder report`: what a run folder holds, as one page that needs nothing else; see `build.py`."""
