"""What a set costs whose members nobody has read."""
