"""Training: objectives, pure steps, losses, optimizer, and one loop for all stages."""
