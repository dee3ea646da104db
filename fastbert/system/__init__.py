"""What touches the operating system: files, locks and the console."""
