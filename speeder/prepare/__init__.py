"""From raw files to a prepared data set: readers, filters, encoders, features."""
