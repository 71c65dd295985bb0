"""Files, machines, downloads and Ray: the base of all other rooms."""
