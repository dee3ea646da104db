"""The examples of an epoch, and their packed, masked batches."""
