"""One module for each `bwlm analyze` command: its result in words, tables and charts."""
