"""Files, machines, downloads and Ray: what every room builds on."""
