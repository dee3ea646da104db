"""What multiplies for an encoder's linear layers in place of `F.linear`."""
