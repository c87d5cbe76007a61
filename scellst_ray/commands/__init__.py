"""The command line: one file a command; commands may import everything."""
