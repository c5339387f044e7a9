"""What the plugin costs requests that name no set."""
