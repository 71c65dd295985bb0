"""Large catalogues: item tokens on disk, and an index over them."""
