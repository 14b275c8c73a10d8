"""The steps of `make setup`. Standard library only, since nothing else is there yet."""
