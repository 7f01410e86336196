"""Which parameters move, how their layers are observed, and where an update is written."""
