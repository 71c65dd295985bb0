"""Studies of finished runs: evaluation, reports, ablations, speed, the demo."""
