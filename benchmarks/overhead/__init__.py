"""What the plugin costs a request."""
