"""Everything that depends on the operating system: files, locks and the console."""
