"""`speeder ablate`: what each part brings, by named changes of one recipe."""
