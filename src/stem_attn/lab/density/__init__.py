"""Speed of presets that keep the same share of blocks."""
