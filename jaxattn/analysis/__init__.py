"""What can be seen inside a forward pass."""
