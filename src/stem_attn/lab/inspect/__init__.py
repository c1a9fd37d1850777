"""What was pruned of a prompt, layer by layer and head by head, as a page."""
