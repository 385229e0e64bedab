"""From a network to its coupled channels: labels flow through one run, are grouped, and the groups are tried."""
