"""`speeder ablate`: what each part contributes, by named changes of one recipe."""
