"""`stem-attn doctor`: what works here, what does not and why, and whether what works is right."""
