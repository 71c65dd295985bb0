"""What a finished run is worth: evaluation, reports, ablations, speed, the demo."""
