"""Command-line tools over datasets; nothing imports them."""
