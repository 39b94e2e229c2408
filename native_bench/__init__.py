"""Measurements of the transfer paths, ours and those of others, side by side."""
