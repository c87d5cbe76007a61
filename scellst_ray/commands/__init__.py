"""The command line: one file per command. Commands may import everything."""
