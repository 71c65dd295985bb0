"""From raw files to prepared data: readers, filters, encoders, features."""
