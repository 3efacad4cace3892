"""Fast forwards and backwards: the walk through blocks, tree attention, LoRA, the head's loss."""
