"""One module per family, found by its name: nothing outside of this folder knows any of them."""
