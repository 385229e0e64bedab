"""Out into use: exported files, and the time a network takes on this machine."""
