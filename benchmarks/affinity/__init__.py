"""What a router that sends a set to the same replica each time is worth."""
