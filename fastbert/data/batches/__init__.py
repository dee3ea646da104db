"""The examples of an epoch, and the packed, masked batches that they are put into."""
