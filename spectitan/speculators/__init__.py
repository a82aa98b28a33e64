"""Draft models: the interface (base), one file a family, and the folders that servers read (serving)."""
