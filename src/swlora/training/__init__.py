"""The training step, the loop around it, and the choice of the layers to train."""
