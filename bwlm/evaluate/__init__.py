"""What a trained model costs per byte, in each direction."""
