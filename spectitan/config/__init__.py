"""Configuration: sections holds the keys, manager loads them."""
