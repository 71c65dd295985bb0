"""Large catalogues: item tokens on disk, and a search index over them."""
